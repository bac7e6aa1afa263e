"""Fake quantization: what n bits do to a tensor, and how a network learns with it.

Two quantizers cover the literature: a *step* quantizer with a fixed or learned step (DFQF Eq. 10-11, the form that
integer hardware executes) and an *affine* one between a lower and an upper bound (GDFQ Eq. 6).
``quantize_layers`` puts them into a network, ``calibrate`` sets their ranges from images.

Taught in notebooks 02 and 07.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib import clipping, graph
from dfqlib.errors import InputError
from dfqlib.spec import INPUT_BITS, QuantSpec, integer_range

__all__ = [
    "AffineQuantizer", "QuantConv2d", "QuantLinear", "QuantSpec", "Quantizer", "StepQuantizer", "affine_quantize",
    "calibrate", "check_steps", "fake_quantize", "integer_range", "parameter_groups", "quantize_layers", "quantizers",
    "set_mode",
]  # fmt: skip

Mode = Literal["float", "calibrate", "quantize"]

MOMENTUM = 0.99
"""Decay of the moving average of activation ranges (GDFQ's released code)."""


_inside = torch.ops.aten.hardtanh_backward
"""(values, x, low, high) -> values where low < x < high, else 0: one vectorized pass, ten times a boolean mask's speed."""


def _just_beyond(bound: int, dtype: torch.dtype) -> float:
    """The number next to ``bound`` in ``dtype``, away from zero: the open interval between two such holds the bounds."""
    if bound == 0:
        return -torch.finfo(dtype).tiny
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(bound)))
    return bound + math.copysign(ulp, bound)


class _FakeQuantize(torch.autograd.Function):
    """One pass forward and one backward instead of autograd's chain of five, without its intermediate tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.range = qmin, qmax
        return torch.div(x, step).round_().clamp_(qmin, qmax).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,) = grads
        x, step = ctx.saved_tensors
        qmin, qmax = ctx.range
        scaled = x / step
        bounds = _just_beyond(qmin, x.dtype), _just_beyond(qmax, x.dtype)
        grad_x = _inside(grad, scaled, *bounds)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        # Inside the range the slope is round(x/step) - x/step; outside it is the bound that x was clamped to.
        slope = scaled.round().clamp_(qmin, qmax).sub_(_inside(scaled, scaled, *bounds))
        grad_step = slope.mul_(grad).sum_to_size(step.shape)
        return grad_x, grad_step, None, None


def fake_quantize(x: Tensor, step: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """Round to a grid of integer codes and back: ``clamp(round(x / step), qmin, qmax) * step`` (DFQF Eq. 10).

    The rounding passes gradients straight through (ties go to even); everything else is differentiated as
    written, which gives the step's gradient of DFQF Eq. 11 and cuts x's gradient outside the range.

    Args:
        x: any shape.
        step: positive; a scalar, or a tensor that broadcasts against x, such as (channels, 1, 1, 1).
        qmin: smallest code, 0 or negative.
        qmax: largest code.

    Returns:
        Tensor shaped like x, differentiable in x and step.

    Raises:
        InputError: a step given as a number is not positive, or qmin is not below qmax.

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
    released code, codes are ``clamp(round(scale * x - zero_point), -2^(k-1), 2^(k-1) - 1)``.

    Args:
        x: any shape.
        low: lower bound, a scalar or one per output channel, shape (x.shape[0],).
        high: upper bound, likewise.
        bits: width k.

    Returns:
        Tensor shaped like x, differentiable in x and in bounds that are tensors; rounding passes straight through.

    Raises:
        InputError: bounds given as numbers are in the wrong order.

    Taught in notebook 02.
    """
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and low > high:
        raise InputError(f"low={low} is above high={high}; pass the smaller bound first")
    low, high = (_per_channel(torch.as_tensor(b, dtype=x.dtype, device=x.device), x) for b in (low, high))
    scale = (2**bits - 1) / (high - low).clamp(min=1e-8)
    zero_point = _round(scale * low) + 2 ** (bits - 1)
    codes = _round(scale * x - zero_point).clamp(*integer_range(bits, signed=True))
    return (codes + zero_point) / scale


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View (channels,) as (channels, 1, ...) against x; scalars stay scalars."""
    return values if values.numel() == 1 else values.reshape(-1, *[1] * (x.ndim - 1))


class StepQuantizer(nn.Module):
    """``fake_quantize`` with a step of its own (DFQF Eq. 10).

    In mode "float" it hands x through, in "calibrate" it also sets its step from x, in "quantize" it quantizes.

    Args:
        bits: width.
        signed: whether x can be negative; unsigned codes spend all of their range on x >= 0.
        channels: number of output channels for one step each, None for one step.
        learned: whether the step is trained.

    Taught in notebook 02.
    """

    def __init__(self, bits: int, *, signed: bool, channels: int | None = None, learned: bool = True) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.qmin, self.qmax = integer_range(bits, signed)
        self.step = nn.Parameter(torch.ones(channels or 1).squeeze(), requires_grad=learned)
        self.mode: Mode = "float"
        self.method, self.lower_bound = "mse", 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "calibrate":
            self.calibrate(x.detach())
        if self.mode != "quantize":
            return x
        return fake_quantize(x, _per_channel(self.step, x), self.qmin, self.qmax)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the step to A / qmax, A being the clip threshold of ``method`` but at least ``lower_bound * max|x|``."""
        per_step = x.reshape(self.step.numel(), -1)
        for row, step in zip(per_step, self.step.view(-1), strict=True):
            clip = clipping.threshold(row, self.bits, self.method, self.signed)
            step.fill_(max(clip, self.lower_bound * float(row.abs().max())) / self.qmax)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, {'signed' if self.signed else 'unsigned'}, steps={self.step.numel()}"


class AffineQuantizer(nn.Module):
    """``affine_quantize`` with bounds of its own (GDFQ Eq. 6).

    In mode "calibrate" it quantizes too, between bounds that are the moving average of each batch's minimum and
    maximum, with the bias of the first batches corrected once: GDFQ's released code corrects recursively and widens
    the range thousands of times around its twentieth step. ``follow=True`` is GDFQ's weight quantizer: bounds
    recomputed at every forward pass.

    Args:
        bits: width.
        channels: number of output channels for bounds of their own, None for one pair.
        learned: whether the bounds are trained.
        follow: whether the bounds are those of the x at hand.

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
        """Take x's minimum and maximum into the bounds: alone when they follow x, else into the running mean."""
        rows = x.reshape(self.low.numel(), -1)
        self.batches += 1
        weight = 1.0 if self.follow else (1 - MOMENTUM) / (1 - MOMENTUM ** int(self.batches))
        self.low.lerp_(rows.amin(1).view_as(self.low).to(self.low), weight)
        self.high.lerp_(rows.amax(1).view_as(self.high).to(self.high), weight)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, bounds={self.low.numel()}, follow={self.follow}"


Quantizer = StepQuantizer | AffineQuantizer


class QuantConv2d(nn.Conv2d):
    """A convolution whose weights pass through ``weight_quantizer``."""

    weight_quantizer: Quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """A linear layer whose weights pass through ``weight_quantizer``."""

    weight_quantizer: Quantizer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


_QUANTIZED: dict[Any, type[nn.Module]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}


def quantize_layers(model: nn.Module, spec: QuantSpec) -> fx.GraphModule:
    """A copy of ``model`` in which every conv and linear layer, and every tensor that feeds one, has a quantizer.

    One tensor, one quantizer: it is inserted where the tensor is made (whatever made it) and all readers see its
    output, the skip connection included, unless ``spec.skip`` is "float". The quantizers hand values through until
    ``calibrate`` has set their ranges. Layers inside a submodule that cannot be traced get a quantizer at their own
    input (signed, since the structure is unknown); whatever has weights and stays in floating point is listed in
    ``network.meta["unquantized"]``, and ``network.meta["spec"]`` is the spec.

    Args:
        model: a classifier called with one tensor of shape (batch, channels, height, width); left as it is.
        spec: widths and scheme.

    Raises:
        InputError: the model has no Conv2d or Linear layer.

    Taught in notebook 07.
    """
    network, opaque = graph.trace(model)
    calls = [node for node in network.graph.nodes if graph.operation(node) in _QUANTIZED]
    inside = [name for top in opaque for name in _layers_inside(network, top)]
    names = [str(node.target) for node in calls] + inside
    if not names:
        raise InputError(f"model={type(model).__name__} has no Conv2d or Linear layer, so there is nothing to quantize")
    edges = {names[0], names[-1]}
    for name in dict.fromkeys(names):
        _quantize_weights(network.get_submodule(name), spec, spec.edge_bits if name in edges else spec.weight_bits)
    _insert_activation_quantizers(network, calls, edges, spec)
    for name in inside:
        bits = spec.edge_bits if name in edges else spec.activation_bits
        layer = network.get_submodule(name)
        layer.input_quantizer = _activation_quantizer(bits, True, spec)
        layer.register_forward_pre_hook(_quantize_input)
    network.meta.update(spec=spec, unquantized=_unquantized(network))
    return network.eval()


def _layers_inside(network: nn.Module, top: str) -> list[str]:
    modules = network.get_submodule(top).named_modules(prefix=top)
    return [name for name, module in modules if type(module) in _QUANTIZED]


def _quantize_weights(layer: Any, spec: QuantSpec, bits: int) -> None:
    channels = layer.weight.shape[0] if spec.granularity == "channel" else None
    learned = spec.step == "learned"
    layer.__class__ = _QUANTIZED[type(layer)]
    layer.weight_quantizer = (
        StepQuantizer(bits, signed=True, channels=channels, learned=learned)
        if spec.scheme == "symmetric"
        else AffineQuantizer(bits, channels=channels, learned=learned, follow=not learned)
    )


def _activation_quantizer(bits: int, signed: bool, spec: QuantSpec) -> "Quantizer":
    learned = spec.step == "learned"
    if spec.scheme == "affine":
        return AffineQuantizer(bits, learned=learned)
    return StepQuantizer(bits, signed=signed, learned=learned)


def _insert_activation_quantizers(
    network: fx.GraphModule, calls: list[fx.Node], edges: set[str], spec: QuantSpec
) -> None:
    readers: dict[fx.Node, list[fx.Node]] = {}
    for call in calls:
        source = call.all_input_nodes[0]
        tensor = graph.stored_tensor(source) if spec.skip == "quantized" else source
        readers.setdefault(tensor, []).append(call)
    for tensor, layers in readers.items():
        at_edge = {str(layer.target) for layer in layers} <= edges
        bits = spec.edge_bits if at_edge else spec.activation_bits
        is_input = not _depends_on(tensor, set(calls))
        quantizer = _activation_quantizer(
            INPUT_BITS if is_input else bits, is_input or not graph.is_non_negative(tensor), spec
        )
        name = f"quantize_{tensor.name}"
        network.add_submodule(name, quantizer)
        with network.graph.inserting_after(tensor):
            quantized = network.graph.call_module(name, (tensor,))
        unaware = set(tensor.users) - set(layers) if spec.skip == "float" else set()
        for reader in set(tensor.users) - unaware - {quantized}:
            reader.replace_input_with(tensor, quantized)
    network.graph.lint()
    network.recompile()


def _depends_on(node: fx.Node, targets: set[fx.Node]) -> bool:
    seen, pending = set(), [node]
    while pending:
        node = pending.pop()
        if node in targets:
            return True
        pending += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return False


def _quantize_input(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.input_quantizer(args[0]), *args[1:])


def _unquantized(network: nn.Module) -> list[str]:
    """Modules that multiply by a weight of their own (a matrix or more) and have no quantizer, and such functions."""
    return [
        name
        for name, module in network.named_modules()
        if not hasattr(module, "weight_quantizer") and any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]


def quantizers(network: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer of a network with its name, weights ("conv1.weight_quantizer") and tensors ("quantize_relu")."""
    return ((name, m) for name, m in network.named_modules() if isinstance(m, StepQuantizer | AffineQuantizer))


def set_mode(network: nn.Module, mode: Mode) -> None:
    """Let every quantizer hand values through ("float"), set its range ("calibrate") or quantize ("quantize")."""
    for _, quantizer in quantizers(network):
        quantizer.mode = mode


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor, method: str = "mse", lower_bound: float = 0.0) -> None:
    """Set every range from one pass of ``images`` and leave the network quantizing.

    Args:
        network: what ``quantize_layers`` made, in eval mode.
        images: (batch, channels, height, width), normalized like the data.
        method: clipping method of step quantizers, one of ``clipping.METHODS``; affine ones take min and max.
        lower_bound: smallest threshold as a share of max|x| (DFQF: 0.3, its released code: 0.5).

    Taught in notebook 02.
    """
    for _, quantizer in quantizers(network):
        if isinstance(quantizer, StepQuantizer):
            quantizer.method, quantizer.lower_bound = method, lower_bound
    set_mode(network, "calibrate")
    network(images)
    set_mode(network, "quantize")


def check_steps(network: nn.Module) -> None:
    """Raise InputError naming the quantizer whose learned step has reached zero or below (or is not a number)."""
    for name, quantizer in quantizers(network):
        if isinstance(quantizer, StepQuantizer) and not bool((quantizer.step > 0).all()):
            raise InputError(
                f"the step of {name} became {quantizer.step.min().item():.3g}, but a step must stay positive: "
                "lower the step learning rate, or raise the lower bound of its threshold"
            )


def parameter_groups(network: nn.Module, lr: float, step_lr: float) -> list[dict[str, Any]]:
    """Optimizer groups: weights at ``lr``; steps and bounds at ``step_lr`` without momentum and decay (DFQF 3.2)."""
    ranges = {id(p) for _, quantizer in quantizers(network) for p in quantizer.parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in ranges], "lr": lr},
        {"params": [p for p in trained if id(p) in ranges], "lr": step_lr, "momentum": 0.0, "weight_decay": 0.0},
    ]
