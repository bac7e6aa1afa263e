"""Quantizer modules with a fixed or learned step size (DFQF), or two bounds (GDFQ).

Taught in notebook 02.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from dfqlib import clipping
from dfqlib.network.folding import per_channel
from dfqlib.quantizer.functions import affine_quantize, fake_quantize
from dfqlib.spec import integer_range

Mode = Literal["float", "calibrate", "quantize"]

MOMENTUM = 0.9
"""Decay of the moving average of activation ranges (GDFQ's released code)."""


class StepQuantizer(nn.Module):
    """``fake_quantize`` with its own step size (DFQF Eq. 10).

    In mode "float" it returns x unchanged; in "calibrate" it also sets its step size from x; in "quantize" it rounds x.

    Args:
        bits: bit width.
        signed: whether x can be negative; unsigned integer values use all of their range for x >= 0.
        channels: number of output channels for one step size each, None for one in all.
        learned: whether the step size is trained.

    Taught in notebook 02.
    """

    def __init__(self, bits: int, *, signed: bool, channels: int | None = None, learned: bool = True) -> None:
        super().__init__()
        self.bits = bits
        self.set_sign(signed)
        self.step = nn.Parameter(torch.ones(channels or 1).squeeze(), requires_grad=learned)
        self.mode: Mode = "float"
        self.method, self.lower_bound = "mse", 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "calibrate":
            self.calibrate(x.detach())
        if self.mode != "quantize":
            return x
        return fake_quantize(x, per_channel(self.step, x), self.qmin, self.qmax)

    def set_sign(self, signed: bool) -> None:
        """Use the signed or the unsigned integer range of this bit width."""
        self.signed = signed
        self.qmin, self.qmax = integer_range(self.bits, signed)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the step to A / qmax, A being the clip threshold of ``method`` but at least ``lower_bound * max|x|``.

        An unsigned quantizer that meets a negative value becomes signed: what is observed overrules what was assumed.
        """
        if not self.signed and bool((x < 0).any()):
            self.set_sign(True)
        per_step = x.reshape(self.step.numel(), -1)
        for row, step in zip(per_step, self.step.view(-1), strict=True):
            clip = clipping.threshold(row, self.bits, self.method, self.signed)
            step.fill_(max(clip, self.lower_bound * float(row.abs().max())) / self.qmax)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, {'signed' if self.signed else 'unsigned'}, steps={self.step.numel()}"


class AffineQuantizer(nn.Module):
    """``affine_quantize`` with its own bounds (GDFQ Eq. 6).

    In mode "calibrate" it quantizes too, between moving averages of each batch's minimum and maximum. The bias of the
    first batches is corrected once: GDFQ's released code corrects recursively, which widens the range thousands of
    times around its twentieth iteration. ``follow=True`` is GDFQ's weight quantizer.

    Args:
        bits: bit width.
        channels: number of output channels for one pair of bounds each, None for one pair in all.
        learned: whether the bounds are trained.
        follow: whether the bounds are recomputed from x at every forward pass.

    Taught in notebook 02.
    """

    batches: Tensor

    def __init__(self, bits: int, *, channels: int | None = None, learned: bool = False, follow: bool = False) -> None:
        super().__init__()
        self.bits, self.follow = bits, follow
        self.low = nn.Parameter(torch.zeros(channels or 1).squeeze(), requires_grad=learned)
        self.high = nn.Parameter(torch.ones(channels or 1).squeeze(), requires_grad=learned)
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.mode: Mode = "float"

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "float":
            return x
        if self.mode == "calibrate" or self.follow:
            self.calibrate(x.detach())
        return affine_quantize(x, self.low, self.high, self.bits)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the bounds to x's minimum and maximum, or update their moving averages with them."""
        rows = x.reshape(self.low.numel(), -1)
        self.batches += 1
        weight = 1.0 if self.follow else (1 - MOMENTUM) / (1 - MOMENTUM ** int(self.batches))
        self.low.lerp_(rows.amin(1).view_as(self.low).to(self.low), weight)
        self.high.lerp_(rows.amax(1).view_as(self.high).to(self.high), weight)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, bounds={self.low.numel()}, follow={self.follow}"


Quantizer = StepQuantizer | AffineQuantizer
