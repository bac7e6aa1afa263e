"""Distances between the statistics of a batch and those stored in the BatchNorm layers."""

import torch
from torch import Tensor

from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.losses.outputs import check_variant


def bn_norm_loss(probe: BatchNormProbe, reduction: str = "mean") -> Tensor:
    """Distance of the batch's statistics from the stored ones, norms not squared (DeepInversion).

    Computes ``||mu_hat - mu||_2 + ||v_hat - v||_2`` for each layer, with the biased variance. The gradient of a norm
    that is not squared has the same length at every distance, so no layer dominates the others.

    Args:
        probe: a probe after a forward pass.
        reduction: "mean" over the layers (the express recipe), or their "sum" (the paper).

    Returns:
        Scalar tensor, differentiable in the network's input.

    Raises:
        InputError: ``reduction`` is unknown, or the probe is empty.

    Taught in notebook 03.
    """
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction={reduction!r} is unknown: use 'mean' or 'sum'")
    terms = []
    for layer in probe:
        mean, var = layer.statistics()
        terms.append((mean - layer.stored_mean).norm() + (var - layer.stored_var).norm())
    total = torch.stack(terms).sum()
    return total / len(terms) if reduction == "mean" else total


def bn_divergence_loss(probe: BatchNormProbe) -> Tensor:
    """Statistics term (DFQF, Eq. 7), as its released code computes it.

    Computes ``sum_l mean_c[v_hat - v log v_hat + (mu_hat - mu)^2]`` with the unbiased variance ``v_hat``. The paper
    prints a sum over the channels, which is larger by their number. The minimum, where the statistics agree, is not 0.

    Args:
        probe: a probe after a forward pass.

    Returns:
        Scalar tensor, differentiable in the network's input.

    Taught in notebook 04.
    """
    total = torch.zeros(())
    for layer in probe:
        mean, var = layer.statistics(unbiased=True)
        log_var = var.clamp_min(layer.eps).log()  # a dead channel must not make the loss infinite
        total = total.to(var) + (var - layer.stored_var * log_var + (mean - layer.stored_mean).square()).mean()
    return total


def bn_l2_loss(probe: BatchNormProbe, variant: str = "paper") -> Tensor:
    """Squared distance of the batch's statistics from the stored ones (GDFQ, Eq. 5).

    Computes ``||mu_hat - mu||^2 + ||v_hat - v||^2`` for each layer, with the biased variance.

    Args:
        probe: a probe after a forward pass.
        variant: "paper" sums over channels and layers, "released" averages over both as the authors' code does.

    Returns:
        Scalar tensor, differentiable in the network's input.

    Raises:
        InputError: ``variant`` is unknown, or the probe is empty.

    Taught in notebook 03.
    """
    check_variant(variant)
    terms = []
    for layer in probe:
        mean, var = layer.statistics()
        gaps = (mean - layer.stored_mean).square() + (var - layer.stored_var).square()
        terms.append(gaps.sum() if variant == "paper" else gaps.mean())
    stacked = torch.stack(terms)
    return stacked.sum() if variant == "paper" else stacked.mean()


def bn_gaussian_kl_loss(probe: BatchNormProbe) -> Tensor:
    """KL divergence between Gaussians with the batch's and with the stored statistics (DFQF, Eq. 6; AKD).

    Computes ``sum_l sum_c [(v_hat + (mu_hat - mu)^2) / (2 v) - log(v_hat / v) / 2 - 1/2]``, which is 0 where the
    statistics agree. Variances are clamped at the layer's eps.

    Args:
        probe: a probe after a forward pass.

    Returns:
        Scalar tensor, differentiable in the network's input.

    Taught in notebook 08.
    """
    terms = []
    for layer in probe:
        mean, var = layer.statistics()
        var, stored_var = var.clamp_min(layer.eps), layer.stored_var.clamp_min(layer.eps)
        gap = (mean - layer.stored_mean).square()
        terms.append(((var + gap) / (2 * stored_var) - 0.5 * (var / stored_var).log() - 0.5).sum())
    return torch.stack(terms).sum()


def zeroq_loss(probe: BatchNormProbe, images: Tensor) -> Tensor:
    """Statistics term of ZeroQ: the mean and standard deviation of each image against the stored ones.

    Computes ``sum_l mean_n(||mu_n - mu||^2 + ||sigma_n - sigma||^2)``, with the unbiased variance of the released
    code, plus the same term for the pixels with mean 0 and deviation 1. BatchNorm layers after a linear layer are
    left out, because one image has one value per channel there.

    Args:
        probe: a probe after a forward pass of ``images``.
        images: the network's input, shape (batch, channels, height, width).

    Returns:
        Scalar tensor, differentiable in ``images``.

    Taught in notebook 03.
    """
    values = images.flatten(2)
    total = _sample_gap(values.mean(2), values.var(2), values.new_zeros(()), values.new_ones(()))
    for layer in probe:
        if layer.input.dim() > 2:
            mean, var = layer.statistics(per_sample=True, unbiased=True)
            total = total + _sample_gap(mean, var, layer.stored_mean, layer.stored_var)
    return total


def deviation(var: Tensor) -> Tensor:
    """Standard deviation ``sqrt(var + 1e-6)``, whose gradient is finite at a variance of 0."""
    return (var + 1e-6).sqrt()


def _sample_gap(mean: Tensor, var: Tensor, stored_mean: Tensor, stored_var: Tensor) -> Tensor:
    gaps = (mean - stored_mean).square() + (deviation(var) - deviation(stored_var)).square()
    return gaps.sum(1).mean()
