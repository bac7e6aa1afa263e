"""The parameter-free shortcut of a ResNet (option A: every second pixel, padded with channels of zeros) as one kernel.

A 1×1 convolution with weights of zeros and ones computes exactly what a Slice and a Pad compute, in one kernel.

Taught in notebook 10.
"""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx
from torch.nn import functional as F

from dfqlib.deploy.onnx.writer import Writer


@dataclass(frozen=True)
class Shortcut:
    """Strides (vertical, horizontal), and the channels of zeros before and after those of the input."""

    strides: tuple[int, int]
    before: int
    after: int


def sampled_and_padded(writer: Writer, node: fx.Node) -> Shortcut | None:
    """A slice of integers and the padding that alone reads it; None if ``node`` is no such slice."""
    if node.target is not operator.getitem or len(node.users) != 1:
        return None
    source, reader = node.all_input_nodes[0], next(iter(node.users))
    if source not in writer.quantizers or reader.target is not F.pad or len(writer.shapes[source.name]) != 3:
        return None
    index: Any = node.args[1]
    amounts: Any = reader.args[1] if len(reader.args) > 1 else reader.kwargs["pad"]
    everything, *pixels = index if isinstance(index, tuple) else (index,)
    if (
        everything != slice(None)
        or len(pixels) != 3
        or pixels[0] != slice(None)
        or len(amounts) != 6
        or any(amounts[:4])
        or min(amounts) < 0
    ):
        return None
    if any(not isinstance(part, slice) or part.start or part.stop is not None or not part.step for part in pixels[1:]):
        return None
    return Shortcut((pixels[1].step, pixels[2].step), amounts[4], amounts[5])


def write_shortcut(writer: Writer, node: fx.Node, shortcut: Shortcut) -> None:
    """Write both as the convolution, named after the padding."""
    source = node.all_input_nodes[0].all_input_nodes[0]
    channels, quantizer = writer.shapes[source.name][0], writer.quantizers[source]
    weight = np.pad(np.eye(channels, dtype=np.int8), ((shortcut.before, shortcut.after), (0, 0)))[:, :, None, None]
    one = writer.constant("one", 1.0, "float32")
    integers = writer.weight(f"{node.name}/ones", weight, 4)
    values = writer.add("DequantizeLinear", [integers, one], f"{node.name}/ones_real")
    strides = list(shortcut.strides)
    writer.add("Conv", [writer.real(source), values], f"{node.name}/sum", kernel_shape=[1, 1], strides=strides)
    writer.keep(
        node,
        writer.add("QuantizeLinear", [f"{node.name}/sum", *writer.scale_constants(source, quantizer)], node.name),
        quantizer,
    )
