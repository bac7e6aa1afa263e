"""A layer and its BatchNorm in integers.

Taught in notebook 10.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dfqlib.deploy.integer.arithmetic import RoundClamp, to_integers, zero_point
from dfqlib.errors import InputError
from dfqlib.network.convolution import convolve
from dfqlib.network.folding import per_channel
from dfqlib.quantizer import QuantConv2d, QuantLinear, StepQuantizer

EXACT = 2.0**24
"""Up to here float32 represents every integer."""
LARGEST_BIAS = 2.0**23
"""Largest bias in units of its accumulator, which leaves an int32 accumulator enough room for the products."""
SMALLEST_GAIN = 1e-12
"""A BatchNorm gain below this is that of a dead channel: its weights become zero and its bias remains."""
LARGEST_PAIR = 2**15 - 1
"""Largest sum of two products: x86 processors without VNNI add pairs of them in 16 bits, and saturate."""
LARGEST_IN_7_BITS = 63
"""Largest weight of a channel that is stored in 7 bits; -64 is not used."""


class IntegerLayer(nn.Module):
    """A convolution or linear layer and its BatchNorm: integer weights, int32 bias, one multiplier per channel.

    BatchNorm multiplies channel c by ``gain = gamma / sqrt(var + eps)``: a weight step size s becomes ``s * |gain|``,
    and the integer weights change sign where the gain is negative (the most negative one becomes the most positive).
    A BatchNorm without a layer before it is one weight of 1 per channel.

    x86 processors without VNNI instructions multiply unsigned 8-bit inputs by signed 8-bit weights, add the products in
    pairs, and saturate each pair at 16 bits. A channel of 8-bit weights in which any two could exceed that is stored in
    7 bits, with twice the step size: 255, the largest input, times two weights of 63 fits. So every processor computes
    the same. Weights of 7 bits or fewer cannot saturate.

    Args:
        name: of the layer, for messages.
        layer: the layer, or None.
        norm: the BatchNorm whose input is the layer's output, or None.
        source: quantizer of the input.
        target: quantizer of the output; None for logits, which stay in floating point.
    """

    def __init__(
        self,
        name: str,
        layer: QuantConv2d | QuantLinear | None,
        norm: _BatchNorm | None,
        source: StepQuantizer,
        target: StepQuantizer | None,
    ) -> None:
        super().__init__()
        self.name, self.layer, self.norm, self.source, self.target = name, layer, norm, source, target

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integer weights shaped like the weights, integer bias (channels,), and step sizes (channels,)."""
        integers, step, bias = self._quantized()
        if self.norm is not None:
            gain, shift = _affine(self.norm)
            bias = bias * gain + shift
            integers = integers * per_channel(torch.where(gain < 0, -1.0, 1.0), integers)
            integers = integers.clamp(max=self.largest_code)
            scale = step * gain.abs()
        else:
            scale = step.expand(len(integers))
        floor = torch.maximum(bias.abs() / (self.source.step * LARGEST_BIAS), step * SMALLEST_GAIN).detach()
        shrunk = RoundClamp.apply(
            integers * per_channel(scale / floor, integers), -self.largest_code, self.largest_code
        )
        integers = torch.where(per_channel(scale < floor, integers), shrunk, integers)
        scale = torch.maximum(scale, floor)
        return integers, RoundClamp.apply(bias / (self.source.step * scale), -LARGEST_BIAS, LARGEST_BIAS), scale

    @torch.no_grad()
    def settle(self) -> None:
        """Write into layer and BatchNorm what ``integers`` rounds, see ``integer.settle``.

        A weight of 7 bits becomes an even integer of 8 bits, so that settling twice changes nothing.
        """
        _, whole, scale = self.integers()
        integers, step, bias = self._quantized()
        gain, shift = (torch.ones_like(bias), torch.zeros_like(bias)) if self.norm is None else _affine(self.norm)
        missing = whole * self.source.step * scale - (bias * gain + shift)
        if self.norm is not None and self.norm.bias is not None:
            self.norm.bias.add_(missing)
        elif self.norm is not None and self.norm.running_mean is not None:
            self.norm.running_mean.sub_(torch.where(gain == 0, 0.0, missing / gain))
        elif self.layer is not None and self.layer.bias is not None:
            self.layer.bias.add_(missing)
        if self.layer is not None:
            weight = self.layer.weight
            lowest = per_channel(torch.where(gain < 0, -self.largest_code * step, -torch.inf), weight)
            weight.copy_(
                torch.where(
                    per_channel(self.narrowed, weight), integers * per_channel(step, weight), weight.maximum(lowest)
                )
            )

    @property
    def bits(self) -> int:
        """Bit width of the weights."""
        return 2 if self.layer is None else self.layer.weight_quantizer.bits

    @property
    def largest_code(self) -> int:
        """Largest integer weight."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def narrowed(self) -> Tensor:
        """Channels whose weights are stored in 7 bits instead of 8: booleans (channels,)."""
        none = torch.zeros(self.channels, dtype=torch.bool, device=self.source.step.device)
        return self._saturates(self._in_steps()[1]) if self._can_saturate else none

    @property
    def is_convolution(self) -> bool:
        """Whether the runtime sees a Conv: a lone BatchNorm is a depthwise one, of features a diagonal matrix."""
        return not isinstance(self.layer, nn.Linear) and not (
            self.layer is None and isinstance(self.norm, nn.BatchNorm1d)
        )

    @property
    def channels(self) -> int:
        """Channels of the output."""
        if self.layer is not None:
            return len(self.layer.weight)
        assert self.norm is not None
        return int(self.norm.num_features)

    def _quantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integer weights, step size and bias before BatchNorm."""
        like = self.source.step
        none = like.new_zeros(self.channels)
        if self.layer is None:
            ones = like.new_ones(self.channels, 1, 1, 1) if self.is_convolution else torch.eye(self.channels).to(like)
            return ones, like.new_ones(()), none
        scaled, integers, step = self._in_steps()
        if self._can_saturate:
            narrowed = self._saturates(integers)
            integers = torch.where(per_channel(narrowed, integers), _halved(integers, scaled), integers)
            step = torch.where(narrowed, 2 * step, step)
        return integers, step, none if self.layer.bias is None else self.layer.bias

    def _in_steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights in units of their step size, the same as integers, and the step size."""
        assert self.layer is not None
        weight, quantizer = self.layer.weight, self.layer.weight_quantizer
        assert isinstance(quantizer, StepQuantizer)
        step = quantizer.step
        scaled = weight / per_channel(step, weight)
        return scaled, to_integers(scaled, quantizer), step

    @property
    def _can_saturate(self) -> bool:
        """Whether two products of the largest integers exceed 16 bits; never with weights of 7 bits or fewer."""
        return 2 * (self.largest_code + 1) * self._largest_input > LARGEST_PAIR

    @property
    def _largest_input(self) -> int:
        """The largest unsigned byte of an input in a runtime."""
        return self.source.qmax + zero_point(self.source)

    def _saturates(self, integers: Tensor) -> Tensor:
        """Channels in which any two products of one sign exceed 16 bits: booleans (channels,)."""
        flat = integers.detach().flatten(1)
        by_sign = torch.stack([flat, -flat]).clamp(min=0)
        largest_pair = by_sign.topk(min(2, flat.shape[1])).values.sum(2).amax(0)
        return largest_pair * self._largest_input > LARGEST_PAIR

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias, scale = self.integers()
            total = self._accumulate(x.float(), weight, bias)
            if self.target is None:
                return total * _columns(self.source.step * scale, total)
            return to_integers(total * _columns(self.source.step * scale / self.target.step, total), self.target)

    def _accumulate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The int32 accumulator in float32, rounded once where it has more than 24 bits."""
        largest = weight.detach().abs().flatten(1).sum(1) * max(-self.source.qmin, self.source.qmax)
        largest = largest + bias.detach().abs()
        if float(largest.max()) > EXACT:
            return self._product(x.double(), weight.double(), bias.double()).float()
        return self._product(x, weight, bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.is_convolution:
            if x.ndim != 2:
                raise InputError(
                    f'layer "{self.name}" multiplies more than two dimensions, which has no integer form; flatten first'
                )
            return F.linear(x, weight, bias)
        if isinstance(self.layer, nn.Conv2d):
            return convolve(self.layer, x, weight, bias)
        return F.conv2d(x, weight, bias, groups=self.channels)


def _halved(integers: Tensor, scaled: Tensor) -> Tensor:
    """``scaled`` weights rounded to twice the step size; the gradient is that of ``integers``."""
    half = integers / 2
    return half + ((scaled / 2).round().clamp(-LARGEST_IN_7_BITS, LARGEST_IN_7_BITS) - half).detach()


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Gain and shift of a BatchNorm in evaluation mode."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    gain = torch.rsqrt(var + norm.eps)
    if norm.affine:
        gain = gain * norm.weight
    return gain, norm.bias - mean * gain if norm.affine else -mean * gain


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """View (channels,) against an activation of shape (batch, channels, ...)."""
    return values.reshape(1, -1, *[1] * (like.ndim - 2))
