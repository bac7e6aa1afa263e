"""A model of the 8-bit kernels of x86 processors without VNNI, and what an exported file computes with them.

There, ONNX Runtime multiplies unsigned 8-bit inputs by signed 8-bit weights, adds the products of two neighbors, and
cuts each such pair to 16 bits (the instruction ``vpmaddubsw``) before the 32-bit sum. ``saturable`` tells from the
weights alone which channels of a file could lose something to that, whatever the images and whichever products a kernel
pairs; ``run`` computes the logits of a file that way, operation by operation, as the runtime does.

It is written in numpy from the file, so that it shares nothing with the simulation that it is compared with. Against
the real kernels it is strict: those of depthwise layers, for example, add in 32 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.lib.stride_tricks import sliding_window_view
from onnx import numpy_helper
from torch.nn import functional as F

LOWEST, HIGHEST = -(2**15), 2**15 - 1
BYTE = 255
ROWS = 4096
"""Rows of inputs that are multiplied at once, so that their products stay in the processor's cache."""
PRODUCTS = {"Conv", "Gemm", "ConvInteger"}
KEEPS = {"DequantizeLinear", "MaxPool", "Flatten", "Reshape", "Slice", "Identity"}
"""What hands on the bytes that it gets, all or some of them."""

Unfinished = Callable[[np.float32, int], np.ndarray]
"""A result that waits for the QuantizeLinear after it: step and zero point -> whole numbers, not yet cut to a byte."""


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product of a file, as a kernel sees it.

    Attributes:
        codes: the weights, (channels, weights of a channel): pixel by pixel of the window, in each the input channels.
        largest_input: no byte that comes in is larger; the smallest is taken to be 0.
    """

    codes: np.ndarray
    largest_input: int

    def pair_range(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the most that any two products of a channel can add up to, both (channels,)."""
        ordered = np.sort(np.pad(self.codes, ((0, 0), (0, 2))), axis=1)  # a pair may have a zero for its second half
        least, most = ordered[:, :2].sum(1), ordered[:, -2:].sum(1)
        return self.largest_input * least, self.largest_input * most

    @property
    def saturable(self) -> np.ndarray:
        """Channels of which two products could leave 16 bits: booleans (channels,)."""
        least, most = self.pair_range()
        return (least < LOWEST) | (most > HIGHEST)


@dataclass(frozen=True)
class Codes:
    """Whole numbers with a step and a zero point: what DequantizeLinear makes of a tensor."""

    whole: np.ndarray
    step: np.ndarray
    zero: int = 0

    @property
    def centered(self) -> np.ndarray:
        return self.whole.astype(np.int64) - self.zero

    def real(self) -> np.ndarray:
        return self.centered.astype(np.float32) * self.step


def products(path: Path) -> dict[str, Product]:
    """Every integer product of a file, by the name of its output."""
    return File(path).products


def saturable(path: Path) -> dict[str, int]:
    """How many channels of each product of a file could saturate; products without any are left out."""
    counts = {name: int(product.saturable.sum()) for name, product in products(path).items()}
    return {name: count for name, count in counts.items() if count}


def run(path: Path, images: Any, *, everywhere: bool = False, batch: int = 64) -> np.ndarray:
    """The logits of a file, (N, classes), on a processor whose pairs of products saturate.

    Args:
        path: the file.
        images: (N, C, H, W), float32, an array or a tensor.
        everywhere: add in pairs in all channels, also where that provably makes no difference.
        batch: how many images at once.
    """
    file, pixels = File(path), np.asarray(images, np.float32)
    return np.concatenate([file.run(pixels[i : i + batch], everywhere) for i in range(0, len(pixels), batch)])


class File:
    """The nodes and constants of a file."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path).graph
        self.nodes = list(graph.node)
        self.constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.makers = {node.output[0]: node for node in self.nodes}
        self.products = {node.output[0]: self._product(node) for node in self.nodes if node.op_type in PRODUCTS}

    def _product(self, node: Any) -> Product:
        name = node.input[1]
        while name not in self.constants:  # behind a DequantizeLinear, packed codes also behind a Cast
            name = self.makers[name].input[0]
        codes = self.constants[name].astype(np.int64)
        rows = codes.transpose(0, 2, 3, 1) if codes.ndim == 4 else codes
        return Product(rows.reshape(len(rows), -1), self._largest(node.input[0]))

    def _largest(self, name: str) -> int:
        """The largest byte that a tensor can hold, as far as the operations before it tell."""
        node = self.makers[name]
        if node.op_type == "Clip":
            return int(self.constants[node.input[2]])
        if node.op_type == "Gather":
            return int(self.constants[node.input[0]].max())
        if node.op_type == "Concat":
            return max(map(self._largest, node.input))
        if node.op_type == "Pad":
            return max(self._largest(node.input[0]), int(self.constants[node.input[2]]))
        return self._largest(node.input[0]) if node.op_type in KEEPS else BYTE

    def run(self, images: np.ndarray, everywhere: bool) -> np.ndarray:
        values: dict[str, Any] = {**self.constants, "images": images}
        for node in self.nodes:
            given = [values[name] for name in node.input]
            options = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            if node.op_type in PRODUCTS:
                product = self.products[node.output[0]]
                pairs = product.saturable | everywhere
                operation = {"Conv": _conv, "Gemm": _gemm, "ConvInteger": _conv_integer}[node.op_type]
                values[node.output[0]] = operation(product.codes, pairs, *given, **options)
            else:
                values[node.output[0]] = _OPERATIONS[node.op_type](*given, **options)
        logits = values["logits"]
        return logits.real() if isinstance(logits, Codes | _Sums) else logits


@dataclass(frozen=True)
class _Sums:
    """The 32-bit sums of a layer and what one unit of each channel is worth; as a function it is ``Unfinished``."""

    total: np.ndarray
    unit: np.ndarray

    def __call__(self, step: np.float32, zero: int) -> np.ndarray:
        return np.rint(self.total.astype(np.float32) * (self.unit / step)) + zero

    def real(self) -> np.ndarray:
        return self.total.astype(np.float32) * self.unit


def _saturating(rows: np.ndarray, codes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Products of bytes (rows, terms) and codes (channels, terms), those of channels in ``pairs`` added as such."""
    total = np.rint(rows.astype(np.float64) @ codes.T.astype(np.float64)).astype(np.int64)
    if pairs.any():
        odd = ((0, 0), (0, rows.shape[1] % 2))
        rows, codes = np.pad(rows, odd).astype(np.int32), np.pad(codes[pairs], odd).astype(np.int32)
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            total[start : start + ROWS, pairs] = sum(
                np.clip(part[:, i : i + 2] @ codes[:, i : i + 2].T, LOWEST, HIGHEST) for i in range(0, part.shape[1], 2)
            )
    return total


def _windows(
    codes: np.ndarray, pairs: np.ndarray, x: np.ndarray, zero: int, kernel: tuple[int, int], options: dict[str, Any]
) -> np.ndarray:
    """The sums of a convolution of bytes, without what their zero point adds: (N, channels, height, width)."""
    (rows, columns), groups = kernel, options.get("group", 1)
    top, left, bottom, right = options.get("pads", [0] * 4)
    (down, across), (far_down, far_across) = (options.get(name, [1, 1]) for name in ("strides", "dilations"))
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=zero)
    span = (rows - 1) * far_down + 1, (columns - 1) * far_across + 1
    seen = sliding_window_view(x, span, (2, 3))[:, :, ::down, ::across, ::far_down, ::far_across]  # type: ignore[call-overload]
    parts = []
    for inputs, weight, chosen in zip(
        np.split(seen, groups, 1), np.split(codes, groups), np.split(pairs, groups), strict=True
    ):
        terms = inputs.transpose(0, 2, 3, 4, 5, 1)
        total = _saturating(terms.reshape(-1, weight.shape[1]), weight, chosen) - zero * weight.sum(1)
        parts.append(total.reshape(*terms.shape[:3], -1))
    return np.concatenate(parts, 3).transpose(0, 3, 1, 2)


def _conv(
    codes: np.ndarray, pairs: np.ndarray, x: Codes, weight: Codes, bias: Codes | None = None, **options: Any
) -> Any:
    total = _windows(codes, pairs, x.whole, x.zero, weight.whole.shape[2:], options)
    unit = (x.step * weight.step).reshape(-1, 1, 1)
    return _Sums(total if bias is None else total + bias.centered.reshape(-1, 1, 1), unit)


def _conv_integer(codes: np.ndarray, pairs: np.ndarray, x: Any, weight: Any, zero: Any, **options: Any) -> np.ndarray:
    return _windows(codes, pairs, x, int(zero), weight.shape[2:], options)


def _gemm(codes: np.ndarray, pairs: np.ndarray, x: Codes, weight: Codes, bias: Codes, transB: int) -> _Sums:
    assert transB
    return _Sums(_saturating(x.whole, codes, pairs) - x.zero * codes.sum(1) + bias.centered, x.step * weight.step)


def _quantize(x: Any, step: np.ndarray, zero: np.ndarray) -> np.ndarray:
    whole = x(step, int(zero)) if callable(x) else np.rint(x / step) + int(zero)
    return whole.clip(0, BYTE).astype(np.uint8)


def _dequantize(whole: np.ndarray, step: np.ndarray, zero: Any = 0, axis: int = 1) -> Codes:
    return Codes(whole, step, int(np.max(zero)))


def _add(a: Any, b: Any) -> Any:
    if not isinstance(a, Codes):
        return a + b

    def total(step: np.float32, zero: int) -> np.ndarray:
        """Two fused multiply-adds, each of which rounds once."""
        first, second = a.step / step, b.step / step
        fixed = np.float32(zero) - (first * np.float32(a.zero) + second * np.float32(b.zero))
        inner = (b.whole * np.float64(second) + np.float64(fixed)).astype(np.float32)
        return np.rint((a.whole * np.float64(first) + inner).astype(np.float32))

    return total


def _multiply(a: Any, b: Any) -> Any:
    return _Sums(a.centered * b.centered, a.step * b.step) if isinstance(a, Codes) else a * b


def _global_average(x: Codes) -> Unfinished:
    pixels = np.float32(x.whole[0, 0].size)
    total = x.centered.sum((2, 3), keepdims=True).astype(np.float32)
    return lambda step, zero: np.rint(total * (x.step / (step * pixels))) + zero


def _max_pool(x: np.ndarray, kernel_shape: Any, strides: Any, pads: Any, dilations: Any, ceil_mode: int) -> np.ndarray:
    pooled = F.max_pool2d(
        torch.from_numpy(x.astype(np.float32)), kernel_shape, strides, pads[:2], dilations, bool(ceil_mode)
    )
    return pooled.numpy().astype(np.uint8)


def _slice(x: np.ndarray, starts: Any, ends: Any, axes: Any, steps: Any) -> np.ndarray:
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _pad(x: np.ndarray, pads: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Negative amounts cut off."""
    before, after = pads.reshape(2, -1)
    padded = np.pad(x, list(zip(before.clip(0), after.clip(0), strict=True)), constant_values=value)
    return padded[tuple(slice(max(-b, 0), min(a, 0) or None) for b, a in zip(before, after, strict=True))]


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Add": _add,
    "Mul": _multiply,
    "GlobalAveragePool": _global_average,
    "MaxPool": _max_pool,
    "Slice": _slice,
    "Pad": _pad,
    "Clip": np.clip,
    "Gather": lambda table, index: table[index],
    "Cast": lambda x, to: x.astype(onnx.helper.tensor_dtype_to_np_dtype(to)),
    "Concat": lambda *parts, axis: np.concatenate(parts, axis),
    "Flatten": lambda x: x.reshape(len(x), -1),
    "Reshape": lambda x, shape: x.reshape(shape),
    "Identity": lambda x: x,
}
