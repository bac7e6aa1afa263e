"""Clip thresholds: a smaller range has a finer step size and clips more values.

Each method returns the threshold A of a range [-A, A], or [0, A] after a ReLU; the step size is A divided by the
largest integer value. Taught in notebook 02.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dfqlib.errors import InputError, NonFiniteError
from dfqlib.spec import check_bits, integer_range

METHODS = ("max", "mse", "aciq", "kl")

SMALLEST = 1e-8
"""Threshold of a tensor of zeros, such as a dead activation: nothing is divided by zero."""


def threshold(x: Tensor, bits: int, method: str = "mse", signed: bool = True) -> float:
    """Clip threshold of a tensor.

    Args:
        x: values to be quantized, any shape.
        bits: bit width, 2 to 16.
        method: "max" (nothing is clipped), "mse" (least squared error), "aciq" (least expected error under a Gaussian
            or Laplace prior) or "kl" (least change of the histogram, as in TensorRT).
        signed: integer values from -2^(n-1) to 2^(n-1) - 1; otherwise 0 to 2^n - 1, for non-negative values.

    Returns:
        The threshold, positive and in the unit of ``x``; ``SMALLEST`` where ``x`` is all zeros.

    Raises:
        InputError: ``x`` is empty, ``bits`` or ``method`` is unknown, or ``x`` has negative values and ``signed`` is
            False.
        NonFiniteError: ``x`` holds a NaN or an infinity.

    Taught in notebook 02.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}")
    check_bits(bits)
    if x.numel() == 0:
        raise InputError(f"x is empty (shape {tuple(x.shape)}): calibrate on at least one value")
    x = x.detach().flatten().float().cpu()  # the same threshold whatever the device
    low, high = (float(bound) for bound in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFiniteError("x holds a NaN or an infinity: find the layer that produces it before calibrating")
    if low < 0 and not signed:
        raise InputError(f"signed=False needs values of 0 or more and x reaches {low:.4g}: use signed=True")
    largest = max(-low, high)
    if largest < SMALLEST:
        return SMALLEST
    if method == "mse":
        return _mse(x, largest, bits, signed)
    if method == "aciq":
        return _aciq(x, low, high, bits, signed) or largest  # 0 where all values are equal
    if method == "kl":
        return _kl(x, largest, bits)
    return largest


def quantization_error(x: Tensor, clip: float | Tensor, bits: int, signed: bool = True) -> Tensor:
    """Mean squared quantization error for each clip threshold.

    Args:
        x: values, any shape.
        clip: one threshold, or several of shape (k,).
        bits: bit width, 2 to 16.
        signed: as in ``threshold``.

    Returns:
        The errors, in squared units of ``x``, shaped like ``clip``.

    Taught in notebook 02.
    """
    check_bits(bits)
    values = x.detach().flatten()
    clips = torch.as_tensor(clip, dtype=values.dtype, device=values.device)
    errors = _errors(values, torch.ones_like(values) / values.numel(), clips.reshape(-1), bits, signed)
    return errors.reshape(clips.shape)


def _errors(values: Tensor, weights: Tensor, clips: Tensor, bits: int, signed: bool) -> Tensor:
    """Weighted squared quantization error of ``values`` for each clip, one at a time to stay in the cache."""
    smallest, largest = integer_range(bits, signed)
    errors = []
    for step in (clips / largest).unbind():
        rounded = torch.div(values, step).round_().clamp_(smallest, largest).mul_(step)
        errors.append(rounded.sub_(values).square_().dot(weights))
    return torch.stack(errors)


def _mse(x: Tensor, largest: float, bits: int, signed: bool) -> float:
    """Threshold of least squared error: a geometric search over three decades, then a linear one around the best."""
    values, weights = _summary(x, largest, bits)
    clips = largest * torch.logspace(-3, 0, 90)
    best = int(_errors(values, weights, clips, bits, signed).argmin())
    finer = torch.linspace(float(clips[max(best - 1, 0)]), float(clips[min(best + 1, 89)]), 30)
    return float(finer[_errors(values, weights, finer, bits, signed).argmin()])


def _summary(x: Tensor, largest: float, bits: int) -> tuple[Tensor, Tensor]:
    """Values and weights that represent a tensor: the tensor itself if it is small, otherwise a histogram.

    There are at least 16 bins per step size where nothing is clipped. Their number is odd, so that one bin is centered
    at zero, where a ReLU's output has many values.
    """
    bins = 2 ** (max(bits, 8) + 5) + 1
    if x.numel() <= bins:
        return x, torch.ones_like(x)
    counts = torch.histc(x, bins, -largest, largest)
    seen = counts > 0
    centers = (torch.arange(bins) - bins // 2) * (2 * largest / bins)
    return centers[seen], counts[seen]


def _aciq(x: Tensor, low: float, high: float, bits: int, signed: bool) -> float:
    """The better of the optimal thresholds for two priors (Banner et al. 2019), chosen as in DFQF's released code.

    The Gaussian's deviation is estimated from the range of the sample, the Laplacian's from the mean absolute
    deviation. Both thresholds are optimal for a symmetric density; without a sign, all levels are on one side, as with
    one bit more. The chosen one has the lower error on a histogram of 201 bins. It may exceed max|x|.
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
    return float(clips[_errors(centers, counts, clips, bits, signed).argmin()])


def _laplace_clip(bits: int) -> float:
    """Minimizer of ``2 exp(-a) + a^2 / (3 * 4^bits)``, the error of a Laplacian of scale 1 clipped at a."""
    return _root(lambda a: a / (3 * 4**bits) - math.exp(-a))


def _gaussian_clip(bits: int) -> float:
    """Minimizer of the error of a standard normal clipped at a: the tails, plus ``a^2 / (3 * 4^bits)``."""

    def slope(a: float) -> float:
        tails = a * math.erfc(a / math.sqrt(2)) - math.sqrt(2 / math.pi) * math.exp(-a * a / 2)
        return tails + a / (3 * 4**bits)

    return _root(slope)


def _root(slope: Callable[[float], float]) -> float:
    """Zero of an increasing function between 0 and 40, by bisection."""
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low


def _kl(x: Tensor, largest: float, bits: int, bins: int = 1001, smoothing: float = 1e-4) -> float:
    """Threshold whose quantized histogram has the least KL divergence from the clipped one (TensorRT, as in MXNet).

    P is the clipped histogram of x: the counts outside are added to the outermost bins. Q is the histogram without
    them, merged into 2^n - 1 groups and spread over the nonempty bins again. The rightmost bin stays empty in Q, as in
    the released code, so that clipping has a cost. Each candidate is a row of one float64 matrix (float32 bin edges
    are not symmetric). From 10 bits on there are more levels than bins, and nothing is clipped.
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
        return largest  # all values are in the outermost bins
    return largest * (2 * int(reach[best]) + 1) / bins


def _smooth(rows: Tensor, inside: Tensor, amount: float) -> Tensor:
    """Normalized rows, with a little mass moved from filled to empty bins to keep the logarithms finite."""
    empty, filled = inside & (rows == 0), inside & (rows > 0)
    taken = amount * empty.sum(1, keepdim=True) / filled.sum(1, keepdim=True)
    smoothed = rows + amount * empty - taken * filled
    return torch.where(taken < 1, smoothed / smoothed.sum(1, keepdim=True), math.nan)
