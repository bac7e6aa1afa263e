"""Integer values: whole numbers in float32, relative to the zero point, in the scale of a quantizer."""

from typing import Any

import torch
from torch import Tensor

from dfqlib.quantizer import StepQuantizer


class RoundClamp(torch.autograd.Function):
    """Round half to even, clamp, and pass the gradient where nothing was clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.range = low, high
        return x.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.range
        return grads[0] * ((x >= low) & (x <= high)), None, None


def to_integers(x: Tensor, quantizer: StepQuantizer, offset: int = 0) -> Tensor:
    """Integer values of ``x / step + offset``; ``offset`` shifts the quantizer's range too."""
    return RoundClamp.apply(x, quantizer.qmin + offset, quantizer.qmax + offset)


def zero_point(quantizer: StepQuantizer) -> int:
    """What a runtime adds to signed integer values, which it keeps in unsigned bytes."""
    return 128 if quantizer.signed else 0


def multiply_add(x: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """``x * factor + addend`` in float32, rounded once at the end as a processor's fused instruction does."""
    return (x.double() * factor.double() + addend.double()).float()


def pair(value: Any) -> tuple[int, int]:
    """Height and width of a size that may be given as one number."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
