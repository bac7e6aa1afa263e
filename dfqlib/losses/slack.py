"""Slack of DSG: a distance between statistics costs nothing within a margin, which keeps the images diverse."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfqlib.batchnorm import BatchNormProbe, LayerInput
from dfqlib.errors import InputError
from dfqlib.losses.statistics import deviation


class SlackMargin(NamedTuple):
    """Largest distances of one layer's mean and deviation that cost nothing: delta and gamma of DSG."""

    mean: float
    std: float


def slack_margins(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    percentile: float = 0.9,
    images: int = 1024,
    batch_size: int = 128,
    rng: torch.Generator | None = None,
) -> list[SlackMargin]:
    """Run a network on Gaussian images and measure the margins of its BatchNorm layers (DSG).

    A layer's margin is a percentile, over its channels, of the distance between the statistics of all Gaussian images
    together and the stored ones.

    Args:
        model: a trained network in evaluation mode.
        image_shape: (channels, height, width).
        percentile: DSG's epsilon, from 0 (no slack: the smallest gap) to 1.
        images: how many Gaussian images; 1,024 in the paper.
        batch_size: images per forward pass.
        rng: source of randomness; torch's global one by default.

    Returns:
        One margin for each BatchNorm layer, in order of execution.

    Raises:
        InputError: ``percentile`` is not between 0 and 1, ``images`` is not positive, or there is no BatchNorm.

    Taught in notebook 03.
    """
    if not 0 <= percentile <= 1:
        raise InputError(f"percentile={percentile} must be from 0 to 1, for example 0.9")
    if images < 1 or batch_size < 1:
        raise InputError(f"images={images} and batch_size={batch_size} must be 1 or more")
    device = next(model.parameters()).device
    first: list[Tensor] = []
    second: list[Tensor] = []
    stored: list[LayerInput] = []
    with torch.no_grad(), BatchNormProbe(model) as probe:
        for start in range(0, images, batch_size):
            count = min(batch_size, images - start)
            model(torch.randn(count, *image_shape, generator=rng, device=device))
            stored = list(probe)
            moments = [layer.statistics() for layer in stored]
            weight = count / images
            first = _add(first, [weight * mean for mean, _ in moments])
            second = _add(second, [weight * (var + mean.square()) for mean, var in moments])
    margins = []
    for layer, mean, square in zip(stored, first, second, strict=True):
        var = (square - mean.square()).clamp_min(0)
        gaps = (mean - layer.stored_mean).abs(), (deviation(var) - deviation(layer.stored_var)).abs()
        margins.append(SlackMargin(*(float(gap.quantile(percentile)) for gap in gaps)))
    return margins


def _add(totals: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
    return [total + term for total, term in zip(totals, terms, strict=True)] if totals else terms


def slack_bn_loss(probe: BatchNormProbe, margins: Sequence[SlackMargin]) -> Tensor:
    """Statistics term of DSG (SDA): the part of each distance that exceeds its margin.

    Computes ``sum_l ||max(|mu_hat - mu| - delta_l, 0)||^2 + ||max(|sigma_hat - sigma| - gamma_l, 0)||^2``, the form of
    the paper. (The released training code has ``max(|gap - delta|, 0)``, where the absolute value cancels the slack.)

    Args:
        probe: a probe after a forward pass.
        margins: what ``slack_margins`` measured for the same network.

    Returns:
        Scalar tensor, differentiable in the network's input.

    Raises:
        InputError: there are more or fewer margins than layers, or the probe is empty.

    Taught in notebook 03.
    """
    terms = [_slack_gap(layer, margin, per_sample=False) for layer, margin in _pairs(probe, margins)]
    return torch.stack(terms).sum()


def layerwise_enhancement(probe: BatchNormProbe, margins: Sequence[SlackMargin]) -> Tensor:
    """Layerwise sample enhancement of DSG (LSE): image n weights layer n twice.

    Computes ``(1/N) 1^T (I + 1 1^T) L = (1/N) sum_n (sum_l L_nl + L_nn)``, where ``L_nl`` is the slack loss of image
    n's own statistics in layer l and N the number of BatchNorm layers. Of k * N images, each N are such a batch, and
    the losses add. The variance is biased (ZeroQ's, which DSG's synthesis follows otherwise, is not).

    Args:
        probe: a probe after a forward pass of N images, or a multiple of N.
        margins: what ``slack_margins`` measured for the same network.

    Returns:
        Scalar tensor, differentiable in the network's input.

    Raises:
        InputError: the number of images or of margins does not fit the layers.

    Taught in notebook 03.
    """
    pairs = _pairs(probe, margins)
    batch = len(pairs[0][0].input)
    if batch % len(pairs):
        raise InputError(f"batch of {batch} images: layerwise enhancement needs one for each of {len(pairs)} layers")
    losses = torch.stack([_slack_gap(layer, margin, per_sample=True) for layer, margin in pairs], dim=1)
    own = losses.view(-1, len(pairs), len(pairs)).diagonal(dim1=1, dim2=2)
    return (losses.sum() + own.sum()) / len(pairs)


def _pairs(probe: BatchNormProbe, margins: Sequence[SlackMargin]) -> list[tuple[LayerInput, SlackMargin]]:
    layers = list(probe)
    if len(layers) != len(margins):
        raise InputError(f"margins has {len(margins)} entries for {len(layers)} layers: measure them on this network")
    return list(zip(layers, margins, strict=True))


def _slack_gap(layer: LayerInput, margin: SlackMargin, per_sample: bool) -> Tensor:
    """One layer's loss: a scalar, or shape (batch,)."""
    mean, var = layer.statistics(per_sample)
    gap = ((mean - layer.stored_mean).abs() - margin.mean).clamp_min(0).square().sum(-1)
    if per_sample and layer.input.dim() == 2:
        return gap  # after a linear layer one image has one value per channel, and no deviation
    return gap + ((deviation(var) - deviation(layer.stored_var)).abs() - margin.std).clamp_min(0).square().sum(-1)
