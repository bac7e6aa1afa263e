"""A workaround for a fault of oneDNN, for every network that we train.

The weight gradient of a strided 1×1 convolution writes beyond its workspace when tensors are channels last and there
are fewer input channels than the kernel's block (8 with AVX2, 16 with AVX-512): uxlfoundation/oneDNN#6035. The heap is
corrupted, or the gradient is wrong. Dropping the skipped pixels first and convolving with stride 1 computes the same.

``guard`` replaces the layers of a network; ``guarded`` also catches calls of ``torch.conv2d``.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FIXED_IN = (99,)
"""The first version of oneDNN without the fault. None has been released; a test tells when torch ships one."""


def onednn_version(configuration: str | None = None) -> tuple[int, ...]:
    """The version of oneDNN that torch was built with, as ``(3, 12, 0)``; empty where there is none (ARM wheels)."""
    found = re.search(r"MKL-DNN v(\d+)\.(\d+)\.(\d+)", configuration or torch.__config__.show())
    return tuple(map(int, found.groups())) if found else ()


FAULTY = () < onednn_version() < FIXED_IN
"""Whether this torch has the fault."""


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output of ``layer`` with the given weight and bias instead of its own."""
    on_cpu = next(layer.parameters()).device.type == "cpu"  # of the layer, since x has no device in a trace
    if FAULTY and on_cpu and _is_affected(layer):
        return _unstrided(x, weight, bias, layer.stride, layer.groups)
    return layer._conv_forward(x, weight, bias)


def guard(model: nn.Module) -> nn.Module:
    """Replace the class of strided 1×1 convolutions in a network, in place; names and weights stay."""
    for module in model.modules():
        if FAULTY and isinstance(module, nn.Conv2d) and _is_affected(module):
            kind: Any = type(module)
            if kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward:
                module.__class__ = Unstrided if kind is nn.Conv2d else type(kind.__name__, (Unstrided, kind), {})
    return model


class Unstrided(nn.Conv2d):
    """A convolution whose class ``guard`` has replaced."""

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, input, self.weight, self.bias)


def kind_of(module: nn.Module) -> Any:
    """The class that defines what a module computes: torch's own for a subclass that leaves its forward alone."""
    own = next(kind for kind in type(module).__mro__ if not issubclass(kind, Unstrided))
    for kind in own.__mro__:
        if kind.__module__.startswith("torch.nn.modules") and all(
            getattr(own, name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward", "__call__")
        ):
            return kind
    return own


def restore(model: nn.Module, like: nn.Module) -> nn.Module:
    """Undo ``guard`` in a copy of ``like``, except where ``like`` is guarded, and make it contiguous, in place."""
    for module, original in zip(model.modules(), like.modules(), strict=True):
        if isinstance(module, Unstrided):
            module.__class__ = type(original)  # type: ignore[assignment]
    return model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


class guarded(TorchFunctionMode):
    """A context in which ``torch.conv2d`` drops the pixels that a strided 1×1 convolution skips."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        traced = any(isinstance(each, fx.Proxy) for each in (*args, *(kwargs or {}).values()))
        if func is torch.conv2d and FAULTY and not traced:
            return _conv2d(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    on_cpu, one_pixel = input.device.type == "cpu", input.ndim == 4 and weight.shape[2:] == (1, 1)
    if on_cpu and one_pixel and _pair(stride) != (1, 1) and _is_nothing(padding):
        return _unstrided(input, weight, bias, _pair(stride), groups)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _unstrided(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], groups: int) -> Tensor:
    down, right = stride
    return F.conv2d(x[..., ::down, ::right], weight, bias, groups=groups)


def _is_affected(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.stride != (1, 1) and _is_nothing(layer.padding)


def _is_nothing(padding: Any) -> bool:
    return padding == "valid" or (not isinstance(padding, str) and _pair(padding) == (0, 0))


def _pair(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
