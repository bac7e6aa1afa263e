"""Fake quantization as functions, with their gradients.

Taught in notebook 02.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dfqlib.errors import InputError
from dfqlib.network.folding import per_channel
from dfqlib.spec import integer_range

_inside = torch.ops.aten.hardtanh_backward
"""(values, x, low, high) -> values where low < x < high, else 0: one vectorized pass, ten times as fast as a mask."""


def _just_beyond(bound: int, dtype: torch.dtype) -> float:
    """The number next to ``bound`` in ``dtype``, away from zero: an open interval between two such has both bounds."""
    if bound == 0:
        return -torch.finfo(dtype).tiny
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(bound)))
    return bound + math.copysign(ulp, bound)


def plain_fake_quantize(x: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    """``fake_quantize`` in autograd's own operations: the same values and gradients, in more passes and memory."""
    return _round((x / step).clamp(qmin, qmax)) * step


class _FakeQuantize(torch.autograd.Function):
    """``plain_fake_quantize`` as one node with a few vectorized passes; a test holds the two equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.range = (qmin, qmax)
        return torch.div(x, step).round_().clamp_(qmin, qmax).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,), (x, step), (qmin, qmax) = grads, ctx.saved_tensors, ctx.range
        # Padding's gradient is channels first; mixed layouts take 4 times as long. torch 2.6 cannot compile stride().
        if torch.compiler.is_compiling() or grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        scaled = x / step
        bounds = _just_beyond(qmin, x.dtype), _just_beyond(qmax, x.dtype)
        grad_x = _inside(grad, scaled, *bounds)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        # Inside the range the slope is round(x/step) - x/step; outside it is the bound that x was clamped to.
        slope = scaled.round().clamp_(qmin, qmax).sub_(_inside(scaled, scaled, *bounds))
        return grad_x, slope.mul_(grad).sum_to_size(step.shape), None, None


def fake_quantize(x: Tensor, step: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """Round to integer values and back: ``clamp(round(x / step), qmin, qmax) * step`` (DFQF Eq. 10).

    Rounding passes gradients straight through (ties go to even). The gradient of the step size is LSQ Eq. 3 (Esser et
    al., ICLR 2020): ``round(x / step) - x / step`` inside the range, the bound that x is clamped to outside. That of x
    is 1 where ``x / step`` is within the range and 0 outside: as in the released code, it is cut before rounding.

    Args:
        x: any shape.
        step: step size, positive; a scalar, or a tensor that broadcasts against x, such as (channels, 1, 1, 1).
        qmin: smallest integer value, 0 or negative.
        qmax: largest integer value.

    Returns:
        Tensor shaped like x, differentiable in x and step.

    Raises:
        InputError: a step size given as a number is not positive, or qmin is not below qmax.

    Taught in notebook 02.
    """
    if qmin >= qmax:
        raise InputError(f"qmin={qmin} must be below qmax={qmax}")
    if not isinstance(step, Tensor):
        if not step > 0:
            raise InputError(f"step={step} must be positive; take it from clipping.threshold(x, bits) / qmax")
        step = torch.tensor(step, dtype=x.dtype, device=x.device)
    return _FakeQuantize.apply(x, step, qmin, qmax)


def _round(x: Tensor) -> Tensor:
    """Round with a straight-through gradient."""
    return x + (x.round() - x).detach()


def affine_quantize(x: Tensor, low: Tensor | float, high: Tensor | float, bits: int) -> Tensor:
    """Quantize between two bounds to 2^bits evenly spaced values (GDFQ Eq. 6).

    With scale ``(2^k - 1) / (high - low)`` and the integer zero point ``round(scale * low) + 2^(k-1)`` of the
    released code, integer values are ``clamp(round(scale * x - zero_point), -2^(k-1), 2^(k-1) - 1)``.

    Args:
        x: any shape.
        low: lower bound, a scalar or one per output channel, shape (x.shape[0],).
        high: upper bound, likewise.
        bits: bit width k.

    Returns:
        Tensor shaped like x, differentiable in x and in bounds that are tensors; rounding passes straight through.

    Raises:
        InputError: bounds given as numbers are in the wrong order.

    Taught in notebook 02.
    """
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and low > high:
        raise InputError(f"low={low} is above high={high}; pass the smaller bound first")
    low, high = (per_channel(torch.as_tensor(b, dtype=x.dtype, device=x.device), x) for b in (low, high))
    scale = (2**bits - 1) / (high - low).clamp(min=1e-8)
    zero_point = _round(scale * low) + 2 ** (bits - 1)
    integers = _round(scale * x - zero_point).clamp(*integer_range(bits, signed=True))
    return (integers + zero_point) / scale
