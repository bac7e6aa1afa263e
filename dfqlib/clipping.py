"""Where to clip a tensor before it is quantized: a smaller range has finer steps and cuts off more.

Each method returns the threshold A of a range [-A, A], or [0, A] for what follows a ReLU; the step of the
grid is A divided by the largest code. Taught in notebook 02.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfqlib.errors import InputError, NonFiniteError
from dfqlib.spec import integer_range

METHODS = ("max", "mse", "aciq", "kl")

SMALLEST = 1e-8
"""Threshold of a tensor of zeros: a dead activation gets a fine grid and no division by zero."""


def threshold(x: Tensor, bits: int, method: str = "mse", signed: bool = True) -> float:
    """Clip threshold of a tensor.

    Args:
        x: values to be quantized, any shape.
        bits: width of the codes, 2 to 16.
        method: "max" (nothing is clipped), "mse" (least squared error), "aciq" (least expected error
            under a Gaussian or
            Laplace prior) or "kl" (least change of the histogram, as in TensorRT).
        signed: codes from -2^(n-1) to 2^(n-1) - 1; otherwise half range, 0 to 2^n - 1, for values without
            a sign.

    Returns:
        The threshold, positive and in the units of ``x``; ``SMALLEST`` where all of ``x`` is zero.

    Raises:
        InputError: ``x`` is empty, ``bits`` or ``method`` is unknown, or ``x`` has negative values and
            ``signed`` is False.
        NonFiniteError: ``x`` holds a NaN or an infinity.

    Taught in notebook 02.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}")
    _check_bits(bits)
    if x.numel() == 0:
        raise InputError(f"x is empty (shape {tuple(x.shape)}): calibrate on at least one value")
    x = x.detach().flatten().float().cpu()  # the same threshold whatever the device
    low, high = (float(bound) for bound in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFiniteError("x holds a NaN or an infinity: find the layer that makes it before calibrating")
    if low < 0 and not signed:
        raise InputError(f"signed=False needs values of 0 or more and x reaches {low:.4g}: use signed=True")
    largest = max(-low, high)
    if largest < SMALLEST:
        return SMALLEST
    if method == "mse":
        return _mse(x, largest, bits, signed)
    if method == "aciq":
        return _aciq(x, low, high, bits, signed) or largest  # all values alike: the prior has no width
    if method == "kl":
        return _kl(x, largest, bits)
    return largest


def quantization_error(x: Tensor, clip: float | Tensor, bits: int, signed: bool = True) -> Tensor:
    """Mean squared error of rounding to the grid of a threshold.

    Args:
        x: values, any shape; flattened.
        clip: one threshold, or several of shape (k,).
        bits: width of the codes, 2 to 16.
        signed: which codes there are, as in ``threshold``.

    Returns:
        The error of each threshold, in squared units of ``x``: scalar, or shape (k,).

    Taught in notebook 02.
    """
    _check_bits(bits)
    values = x.detach().flatten()
    clips = torch.as_tensor(clip, dtype=values.dtype, device=values.device)
    errors = _grid_errors(values, torch.ones_like(values) / values.numel(), clips.reshape(-1), bits, signed)
    return errors.reshape(clips.shape)


def _check_bits(bits: Any) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise InputError(f"bits={bits!r} must be a whole number from 2 to 16")


def _grid_errors(values: Tensor, weights: Tensor, clips: Tensor, bits: int, signed: bool) -> Tensor:
    """Weighted squared error of ``values`` on each clip's grid; one clip at a time stays in the cache."""
    smallest, largest = integer_range(bits, signed)
    errors = []
    for step in (clips / largest).unbind():
        rounded = torch.div(values, step).round_().clamp_(smallest, largest).mul_(step)
        errors.append(rounded.sub_(values).square_().dot(weights))
    return torch.stack(errors)


def _mse(x: Tensor, largest: float, bits: int, signed: bool) -> float:
    """The threshold of least error: a geometric search of three decades, then a linear one near the best."""
    values, weights = _summary(x, largest, bits)
    clips = largest * torch.logspace(-3, 0, 90)
    best = int(_grid_errors(values, weights, clips, bits, signed).argmin())
    finer = torch.linspace(float(clips[max(best - 1, 0)]), float(clips[min(best + 1, 89)]), 30)
    return float(finer[_grid_errors(values, weights, finer, bits, signed).argmin()])


def _summary(x: Tensor, largest: float, bits: int) -> tuple[Tensor, Tensor]:
    """Values and weights that stand for a tensor: itself while small, else a histogram.

    A step holds 16 bins or more where nothing is clipped. The number of bins is odd, so that the zeros of
    a ReLU keep their place on the grid.
    """
    bins = 2 ** (max(bits, 8) + 5) + 1
    if x.numel() <= bins:
        return x, torch.ones_like(x)
    counts = torch.histc(x, bins, -largest, largest)
    seen = counts > 0
    centers = (torch.arange(bins) - bins // 2) * (2 * largest / bins)
    return centers[seen], counts[seen]


def _aciq(x: Tensor, low: float, high: float, bits: int, signed: bool) -> float:
    """The better of two priors' optimal thresholds (Banner et al. 2019), picked as DFQF's released code does.

    The Gaussian's deviation is estimated from the range of the sample, the Laplacian's from the mean
    absolute deviation. Both thresholds are optimal for a symmetric density with levels on both sides; a
    half range has one bit more on its only side. The pick is the lower error on a histogram of 201 bins.
    A threshold may exceed max|x|.
    """
    if high == low:
        return 0.0
    bits_two_sided = bits if signed else bits + 1
    spread = 0.35 * (1 + math.sqrt(math.pi * math.log(4))) / 2
    sigma = (high - low) * spread / math.sqrt(2 * math.log(x.numel()))
    deviation = float((x - x.mean()).abs().mean())
    clips = torch.tensor([_gaussian_clip(bits_two_sided) * sigma, _laplace_clip(bits_two_sided) * deviation])
    bins = 201
    counts = torch.histc(x, bins, low, high)
    centers = low + (torch.arange(bins) + 0.5) * ((high - low) / bins)
    return float(clips[_grid_errors(centers, counts, clips, bits, signed).argmin()])


def _laplace_clip(bits: int) -> float:
    """Minimizes ``2 exp(-a) + a^2 / (3 * 4^bits)``, the error of a Laplacian of scale 1 clipped at a."""
    return _root(lambda a: a / (3 * 4**bits) - math.exp(-a))


def _gaussian_clip(bits: int) -> float:
    """Minimizes the error of a standard normal clipped at a: the tails, plus ``a^2 / (3 * 4^bits)``."""

    def slope(a: float) -> float:
        tails = a * math.erfc(a / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
        return tails + a / (3 * 4**bits)

    return _root(slope)


def _root(slope: Callable[[float], float]) -> float:
    """Where an increasing function crosses zero between 0 and 40, by bisection."""
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low


def _kl(x: Tensor, largest: float, bits: int, bins: int = 1001, smoothing: float = 1e-4) -> float:
    """The threshold whose quantized histogram diverges least from the clipped one (TensorRT, MXNet's form).

    P is the histogram of x, what lies outside added to its outermost bins. Q is the histogram without
    that, merged into 2^n - 1 groups and spread again over the bins that were not empty. The outermost bin
    on the right stays empty in Q, as in the released code: so the values clipped there cost something.
    All candidates are rows of one matrix, and in float64: float32 edges of the bins are not symmetric.
    From 10 bits on there are more levels than bins, and nothing is clipped.
    """
    groups = 2**bits - 1
    if groups > bins:
        return largest
    histogram = torch.histc(x.double(), bins, -largest, largest)
    center = bins // 2
    reach = torch.arange(groups // 2, center + 1).unsqueeze(1)  # bins kept on each side of the center
    position = torch.arange(bins) - (center - reach)
    inside = (position >= 0) & (position <= 2 * reach)
    kept = histogram * inside
    below, above = (histogram * (position < 0)).sum(1), (histogram * (position > 2 * reach)).sum(1)
    p = kept + below.unsqueeze(1) * (position == 0) + above.unsqueeze(1) * (position == 2 * reach)

    group = (position // ((2 * reach + 1) // groups)).clamp(0, groups - 1)
    filled = (p > 0).double()
    sums = torch.zeros(len(reach), groups, dtype=torch.float64).scatter_add_(1, group, kept)
    members = torch.zeros_like(sums).scatter_add_(1, group, filled)
    q = (sums / members.clamp_min(1)).gather(1, group) * (kept > 0) * (position != 2 * reach)

    p, q = (_smooth(rows, inside, smoothing) for rows in (p, q))
    divergence = (p.xlogy(p) - p.xlogy(q)).sum(1)
    best = int(divergence.nan_to_num(math.inf).argmin())
    if not math.isfinite(divergence[best]):
        return largest  # all values in the outermost bins: nothing that could be clipped
    return largest * (2 * int(reach[best]) + 1) / bins


def _smooth(rows: Tensor, inside: Tensor, amount: float) -> Tensor:
    """Normalized rows, a little mass moved from filled to empty bins, so that no logarithm is infinite."""
    empty, filled = inside & (rows == 0), inside & (rows > 0)
    taken = amount * empty.sum(1, keepdim=True) / filled.sum(1, keepdim=True)
    smoothed = rows + amount * empty - taken * filled
    return torch.where(taken < 1, smoothed / smoothed.sum(1, keepdim=True), math.nan)
