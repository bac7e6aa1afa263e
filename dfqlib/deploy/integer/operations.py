"""The integer operations between layers: quantization, sums, averages, tables.

Each takes and returns integer values q of real values ``q * step``, with the step sizes of the quantizers it is given.

Taught in notebook 10.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.deploy.integer.arithmetic import multiply_add, pair, to_integers, zero_point
from dfqlib.errors import InputError
from dfqlib.quantizer import StepQuantizer


class Quantize(nn.Module):
    """Floating point to integer values: ``round(x / step)``, the runtime's QuantizeLinear."""

    def __init__(self, target: StepQuantizer) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        return to_integers(x / self.target.step, self.target)


class Dequantize(nn.Module):
    """Integer values to floating point."""

    def __init__(self, source: StepQuantizer) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        return x * self.source.step


class IntegerAdd(nn.Module):
    """The sum of two tensors: ``a * s_a / s_y + b * s_b / s_y``, two fused multiply-adds."""

    def __init__(self, first: StepQuantizer, second: StepQuantizer, target: StepQuantizer) -> None:
        super().__init__()
        self.first, self.second, self.target = first, second, target

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        ratio_a, ratio_b = self.first.step / self.target.step, self.second.step / self.target.step
        zero_a, zero_b, zero = zero_point(self.first), zero_point(self.second), zero_point(self.target)
        fixed = zero - (ratio_a * zero_a + ratio_b * zero_b)
        total = multiply_add(a + zero_a, ratio_a, multiply_add(b + zero_b, ratio_b, fixed))
        return to_integers(total, self.target, zero) - zero


class IntegerProduct(nn.Module):
    """The product of two tensors, ``a * b * (s_a * s_b / s_y)``; one may be a number per channel (a gate)."""

    def __init__(self, first: StepQuantizer, second: StepQuantizer, target: StepQuantizer) -> None:
        super().__init__()
        self.first, self.second, self.target = first, second, target

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return to_integers(a * b * (self.first.step * self.second.step / self.target.step), self.target)


class IntegerAverage(nn.Module):
    """Average pooling: integer sums, then one multiplier.

    Args:
        name: of the layer, for messages.
        pool: AvgPool2d, or AdaptiveAvgPool2d whose output size divides its input's.
        source: quantizer of the input.
        target: quantizer of the averages.
        keepdim: whether a global average keeps two dimensions of size one.
    """

    def __init__(
        self,
        name: str,
        pool: nn.AvgPool2d | nn.AdaptiveAvgPool2d,
        source: StepQuantizer,
        target: StepQuantizer,
        keepdim: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.pool, self.source, self.target, self.keepdim = name, pool, source, target, keepdim

    def window(self, height: int, width: int) -> nn.AvgPool2d | None:
        """The pooling of an image of that size with a window of known size; None for that of the whole image."""
        if isinstance(self.pool, nn.AvgPool2d):
            return self.pool
        sizes: Any = self.pool.output_size
        rows, columns = sizes if isinstance(sizes, tuple | list) else (sizes, sizes)
        rows, columns = rows or height, columns or width
        if (rows, columns) == (1, 1):
            return None
        if height % rows or width % columns:
            raise InputError(
                f"{self.name} pools {height}x{width} to {rows}x{columns} with windows of several sizes, which has no "
                "integer form; choose an image_shape that divides evenly"
            )
        return nn.AvgPool2d((height // rows, width // columns))

    def forward(self, x: Tensor) -> Tensor:
        pool = self.window(*x.shape[2:])
        if pool is None:
            # The count is part of the divisor here and of the multiplier below: that is how the two kernels round.
            divisor = self.target.step * x[0, 0].numel()
            return to_integers(x.sum((2, 3), keepdim=self.keepdim) * (self.source.step / divisor), self.target)
        total = F.avg_pool2d(x, pool.kernel_size, pool.stride, pool.padding, divisor_override=1)
        return to_integers(total * (self.source.step * window_step(pool) / self.target.step), self.target)


def window_step(pool: nn.AvgPool2d) -> Tensor:
    """One over the size of the window: an average is a depthwise convolution with this weight."""
    height, width = pair(pool.kernel_size)
    return torch.tensor(1.0 / (height * width))


class Table(nn.Module):
    """Any function of one number as a table of at most 256 entries; the identity changes the scale (requantization).

    Args:
        function: applied to each real value in floating point.
        source: quantizer of the input.
        target: quantizer of the output.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], source: StepQuantizer, target: StepQuantizer) -> None:
        super().__init__()
        self.function, self.source, self.target = function, source, target

    def entries(self) -> Tensor:
        """The output for each unsigned byte 0 ... 255 of the input, shape (256,)."""
        inputs = torch.arange(256, device=self.source.step.device) - zero_point(self.source)
        return self._compute(inputs.clamp(self.source.qmin, self.source.qmax).float())

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self._compute(x)
        # Looked up, since a vectorized function may differ in the last digit from place to place.
        return self.entries()[x.long() + zero_point(self.source)]

    def _compute(self, x: Tensor) -> Tensor:
        return to_integers(self.function(x * self.source.step) / self.target.step, self.target)


class Clamp(nn.Module):
    """ReLU (no ceiling) or ReLU6 on integer values."""

    def __init__(self, quantizer: StepQuantizer, ceiling: float | None) -> None:
        super().__init__()
        self.quantizer, self.ceiling = quantizer, ceiling

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest integer value that pass."""
        if self.ceiling is None:
            return 0, self.quantizer.qmax
        return 0, min(self.quantizer.qmax, int((self.ceiling / self.quantizer.step.detach()).round()))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(*self.bounds)


class Function(nn.Module):
    """A function or method call on one tensor, with its other arguments, as a module."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.function: Any = node.target if callable(node.target) else getattr(torch, node.target)
        place = next(place for place, argument in enumerate(node.args) if isinstance(argument, fx.Node))
        self.before, self.after = node.args[:place], node.args[place + 1 :]
        self.options = dict(node.kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.before, x, *self.after, **self.options)
