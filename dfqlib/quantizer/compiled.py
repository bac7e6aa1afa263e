"""Fake quantization in compiled kernels: one pass forward and one backward, where PyTorch finds a compiler.

Taught in notebook 07.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from dfqlib.quantizer.functions import PLAIN, Kernels

SMALL = 2**16
"""Below so many numbers the plain kernels take less time than finding the compiled ones."""


@functools.cache
def kernels() -> Kernels:
    """Compiled kernels, made once per process (some 15 s, later from a cache), or the plain ones after a warning.

    They compute in float32 whatever the tensors' type, so that in bfloat16 they round once where the plain ones round
    after each operation; in float32 both give the same codes and add up the step's gradient in another order.
    """
    quantize: Any = torch.compile(_quantize, dynamic=True, fullgraph=True)
    differentiate: Any = torch.compile(_differentiate, dynamic=True, fullgraph=True)

    def forward(x: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
        if not _suits(x, step):
            return PLAIN.forward(x, step, qmin, qmax)
        flat = quantize(_flat(x), _flat(step), *_bounds(qmin, qmax, x.device))
        return flat.as_strided(x.shape, x.stride())

    def backward(
        grad: Tensor, x: Tensor, step: Tensor, qmin: int, qmax: int, wants_step: bool
    ) -> tuple[Tensor, Tensor | None]:
        if not _suits(x, step):
            return PLAIN.backward(grad, x, step, qmin, qmax, wants_step)
        grad_x, grad_step = differentiate(_flat(grad), _flat(x), _flat(step), *_bounds(qmin, qmax, x.device))
        return grad_x.as_strided(x.shape, x.stride()), grad_step.reshape(step.shape).to(step.dtype)

    made = Kernels(forward, backward)
    try:
        x, step = torch.rand(SMALL), torch.tensor(0.1)
        with torch.no_grad():
            made.backward(x, made.forward(x, step, 0, 15), step, 0, 15, True)
    except Exception as error:  # a missing compiler shows in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"compiled=True: PyTorch cannot compile here, plain kernels are used ({reason}); install a C++ compiler",
            stacklevel=3,
        )
        return PLAIN
    return made


def _quantize(x: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    return (torch.clamp(torch.round(x / step), qmin, qmax) * step).to(x.dtype)


def _differentiate(grad: Tensor, x: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor) -> tuple[Tensor, Tensor]:
    scaled = x / step
    inside = (scaled >= qmin) & (scaled <= qmax)
    slope = torch.where(inside, torch.round(scaled) - scaled, torch.clamp(scaled, qmin, qmax))
    return torch.where(inside, grad, 0.0).to(grad.dtype), (slope * grad).sum(dtype=torch.float32)


def _suits(x: Tensor, step: Tensor) -> bool:
    """Whether the tensor is large and lies in one piece: one step for all, no gaps, whatever the order of its axes."""
    whole = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return whole and step.numel() == 1 and x.numel() >= SMALL


def _flat(x: Tensor) -> Tensor:
    """All numbers in the order they lie in memory: one kernel fits every shape.

    Not known to autograd as a view: of a view, the compiler would look at the tensor behind it as well.
    """
    ordered = x if x.is_contiguous() else x.permute(0, 2, 3, 1)
    return torch.ops.aten._unsafe_view(ordered.detach(), (-1,))


@functools.cache
def _bounds(qmin: int, qmax: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As tensors: a kernel would be compiled anew for each number."""
    return torch.tensor([float(qmin)], device=device), torch.tensor([float(qmax)], device=device)
