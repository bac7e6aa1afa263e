"""Diversity of synthetic images.

DSG (Zhang et al., CVPR 2021) argues that images with equal BatchNorm statistics are alike. It plots the mean and the
standard deviation of each image's activations in one layer, which scatter more for real images than for those of
ZeroQ. ``statistics_spread`` measures this scatter.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.losses.outputs import batch_entropy, sample_entropy


def inception_score(logits: Tensor) -> float:
    """Inception score under the teacher: ``exp(mean_x KL(p(y|x) || p(y)))`` with ``p = softmax(logits)``.

    From 1 (the teacher's output is the same for all images) to the number of classes (confident on each image, all
    classes equally frequent). Salimans et al. (2016) use an Inception network; here it is the network to be quantized.

    Args:
        logits: teacher outputs, shape (images, classes).

    Raises:
        InputError: ``logits`` has another shape or no rows.

    Taught in notebook 04.
    """
    if logits.dim() != 2 or not len(logits):
        raise InputError(f"logits has shape {tuple(logits.shape)}; give (images, classes) with one image or more")
    logits = logits.detach().double()
    return float((batch_entropy(logits) - sample_entropy(logits)).exp())  # the mean KL is H(p(y)) - mean H(p(y|x))


def pairwise_distance(samples: Tensor) -> float:
    """Mean root mean square difference of all pairs of samples, in their unit.

    0 where all are equal, about 1.41 for independent noise of deviation 1, whatever the size of the images.

    Args:
        samples: images, features or logits, shape (samples, ...).

    Raises:
        InputError: there are fewer than two samples.

    Taught in notebook 09.
    """
    _check_several(samples, "samples")
    flat = samples.detach().flatten(1)
    return float(F.pdist(flat.double()).mean()) / flat.shape[1] ** 0.5


@dataclass(frozen=True, eq=False)
class LayerSpread:
    """Spread of single images' statistics in the input of one BatchNorm layer.

    Attributes:
        name: qualified name of the layer.
        means: mean of each image in each channel, shape (images, channels).
        stds: standard deviations likewise; 0 where an image has one value per channel.
        mean_spread: standard deviation of ``means`` over the images in units of the layer's stored deviation, averaged
            over the channels.
        std_spread: likewise for ``stds``.
    """

    name: str
    means: Tensor
    stds: Tensor
    mean_spread: float
    std_spread: float


@torch.no_grad()
def statistics_spread(model: nn.Module, images: Tensor, batch: int = 256) -> list[LayerSpread]:
    """Spread over the images of each image's own mean and deviation, layer by layer (DSG's sample-level diversity).

    Args:
        model: a trained network with BatchNorm, in evaluation mode.
        images: shape (images, channels, height, width), two or more.
        batch: images per forward pass.

    Returns:
        One LayerSpread for each BatchNorm layer, in order of execution.

    Raises:
        InputError: fewer than two images, a network in training mode, or one without BatchNorm.

    Taught in notebook 09.
    """
    _check_several(images, "images")
    if model.training:
        raise InputError("model is in training mode, where BatchNorm changes its stored statistics: call model.eval()")
    parts = []
    with BatchNormProbe(model) as probe:
        for chunk in images.split(batch):
            model(chunk)
            parts.append([(layer.name, layer.stored_var + layer.eps, *layer.statistics(True)) for layer in probe])
    spreads = []
    for records in zip(*parts, strict=True):
        name, stored_var = records[0][:2]
        means, stds = torch.cat([r[2] for r in records]), torch.cat([r[3] for r in records]).sqrt()
        spreads.append(LayerSpread(name, means, stds, _spread(means, stored_var), _spread(stds, stored_var)))
    return spreads


def _spread(values: Tensor, stored_var: Tensor) -> float:
    return float((values.var(0, correction=0) / stored_var).sqrt().mean())


def _check_several(samples: Tensor, name: str) -> None:
    if samples.dim() < 2 or len(samples) < 2:
        raise InputError(f"{name} has shape {tuple(samples.shape)}; give two or more along the first dimension")
