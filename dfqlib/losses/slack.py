"""DSG's slack: a statistic within its margin costs nothing, so that images stay diverse."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfqlib.batchnorm import BatchNormProbe, LayerInput
from dfqlib.errors import InputError
from dfqlib.losses.statistics import deviation


class SlackMargin(NamedTuple):
    """How far one layer's statistics may be off for nothing: the delta and gamma of DSG."""

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
    """Margins of every BatchNorm layer, measured on Gaussian inputs (DSG).

    A layer's margin is the percentile, over its channels, of the gap between the statistics of all the
    Gaussian images together and those stored.

    Args:
        model: a trained network in evaluation mode.
        image_shape: (channels, height, width) of its input.
        percentile: DSG's epsilon, from 0 (no slack: the smallest gap) to 1.
        images: how many Gaussian images; 1,024 in the paper.
        batch_size: how many of them go through the network at once.
        rng: source of randomness; torch's global one by default.

    Returns:
        One margin for each BatchNorm layer, in the order in which they run.

    Raises:
        InputError: ``percentile`` is not between 0 and 1, ``images`` is not positive, or there is no
            BatchNorm.

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
    """Statistics term of DSG: only what a gap exceeds its margin by costs anything.

    Computes ``sum_l ||max(|mu_hat - mu| - delta_l, 0)||^2 + ||max(|sigma_hat - sigma| - gamma_l,
    0)||^2``. (The released training code takes ``max(|gap - delta|, 0)``, whose absolute value cancels
    the slack: this is the paper's form.)

    Args:
        probe: a probe that has seen a forward pass.
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
    """DSG's statistics term with another focus for each image: image n weights layer n twice.

    Computes ``(1/N) 1^T (I + 1 1^T) L``, with the slack loss of each of the N layers on the statistics of
    each image alone: ``(1/N) sum_n (sum_l L_nl + L_nn)``. It needs one image for each BatchNorm layer; of a
    multiple, every N images are such a batch, and the losses add: no image feels the others.

    Args:
        probe: a probe that has seen a forward pass of as many images as there are BatchNorm layers, or a multiple.
        margins: what ``slack_margins`` measured for the same network.

    Returns:
        Scalar tensor, differentiable in the network's input.

    Raises:
        InputError: the batch has another size, or the number of margins is another.

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
        return gap  # one value of a fully connected layer has no deviation
    return gap + ((deviation(var) - deviation(layer.stored_var)).abs() - margin.std).clamp_min(0).square().sum(-1)
