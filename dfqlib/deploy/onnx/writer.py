"""Collect the nodes and constants of an ONNX file while the integer graph is visited.

Taught in notebook 10.
"""

import importlib
from typing import Any

import numpy as np
from torch import Tensor, fx

from dfqlib.deploy.integer.arithmetic import zero_point
from dfqlib.deploy.integer.layer import IntegerLayer
from dfqlib.deploy.integer.operations import Clamp
from dfqlib.errors import InputError
from dfqlib.network import graph
from dfqlib.quantizer import StepQuantizer

OPSETS = {"int8": (17, 8), "int4": (21, 10)}
"""Opset and file format version of each container: the oldest that have what it needs, for the most readers."""
INPUT, OUTPUT = "images", "logits"

Shapes = dict[str, tuple[int, ...]]


class Writer:
    """Nodes and constants so far. An integer tensor has its node's name; its real values have the suffix "/real".

    Args:
        shapes: of each node's tensor, without the batch.
        container: "int8" or "int4".
    """

    def __init__(self, shapes: Shapes, container: str) -> None:
        self.onnx = importlib.import_module("onnx")
        self.shapes, self.container = shapes, container
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.names: dict[Any, str] = {}
        self.quantizers: dict[Any, StepQuantizer] = {}
        self.clipped: set[fx.Node] = set()
        self._steps: dict[StepQuantizer, str] = {}
        self._dequantized: set[str] = set()

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node; returns the name of its output."""
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: Any, kind: str) -> str:
        """Add a constant of numpy type ``kind`` (or "int4") unless it is there; returns its name."""
        if name not in self.constants:
            array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
            if kind == "int4":
                self.constants[name] = self._packed(name, array)
            else:
                self.constants[name] = self.onnx.numpy_helper.from_array(np.asarray(array, kind, order="C"), name)
        return name

    def bound(self, value: int, quantizer: StepQuantizer) -> str:
        """An integer value as the constant byte that a runtime stores."""
        byte = value + zero_point(quantizer)
        return self.constant(f"code/{byte}", byte, "uint8")

    def real(self, node: fx.Node) -> str:
        """The name of a tensor's values, dequantized once for all of its readers."""
        if node not in self.quantizers:
            return self.names[node]
        name = f"{self.names[node]}/real"
        if name not in self._dequantized:
            self._dequantized.add(name)
            self.add("DequantizeLinear", [self.names[node], *self.scale_constants(node, self.quantizers[node])], name)
        return name

    def store(self, node: fx.Node, values: str, quantizer: StepQuantizer) -> None:
        """Quantize ``values`` as the integer tensor of ``node``, clipped where a byte exceeds the quantizer's range."""
        low, high = self._bounds(node, quantizer)
        whole = (low + zero_point(quantizer), high + zero_point(quantizer)) == (0, 255)
        name = node.name if whole else f"{node.name}/byte"
        self.add("QuantizeLinear", [values, *self.scale_constants(node, quantizer)], name)
        if not whole:
            self.add("Clip", [name, self.bound(low, quantizer), self.bound(high, quantizer)], node.name)
        self.keep(node, node.name, quantizer)

    def _bounds(self, node: fx.Node, quantizer: StepQuantizer) -> tuple[int, int]:
        """Smallest and largest value to store: the quantizer's, or those of a ReLU that alone reads ``node``."""
        reader = next(iter(node.users))
        module = graph.module_of(reader) if reader.op == "call_module" else None
        if len(node.users) == 1 and isinstance(module, Clamp):
            self.clipped.add(node)
            return module.bounds
        return quantizer.qmin, quantizer.qmax

    def keep(self, node: fx.Node, name: str, quantizer: StepQuantizer | None) -> None:
        """Record the name of ``node``'s tensor and its quantizer (None: it is in floating point)."""
        self.names[node] = name
        if quantizer is not None:
            self.quantizers[node] = quantizer

    def weight(self, name: str, integers: Any, bits: int) -> str:
        """Integer weights as int8; packed ones are unpacked when the file is loaded, since kernels read bytes."""
        if self.container == "int8" or bits > 4:
            return self.constant(name, integers, "int8")
        return self.add("Cast", [self.constant(name, integers, "int4")], f"{name}/int8", to=self.onnx.TensorProto.INT8)

    def layer_constants(self, node: fx.Node, layer: IntegerLayer) -> list[str]:
        """Dequantized weight and bias of a layer; the bias has the scale of the accumulator."""
        integers, bias, steps = layer.integers()
        weight_step = self.constant(f"{node.name}/weight_step", steps, "float32")
        bias_step = self.constant(f"{node.name}/bias_step", layer.source.step * steps, "float32")
        pairs = {
            "weight": [self.weight(f"{node.name}/weight", integers, layer.bits), weight_step],
            "bias": [self.constant(f"{node.name}/bias", bias, "int32"), bias_step],
        }
        if not layer.is_convolution:  # ONNX Runtime fuses a matrix product only if told even that this is zero
            pairs["weight"].append(self.constant(f"{node.name}/weight_zero", np.zeros(len(steps)), "int8"))
        return [
            self.add("DequantizeLinear", inputs, f"{node.name}/{part}_real", axis=0) for part, inputs in pairs.items()
        ]

    def average_weight(self, node: fx.Node, ones: Tensor, step: Tensor) -> str:
        """The weight of an average: ones, times one over their number."""
        inputs = [
            self.constant(f"{node.name}/weight", ones, "int8"),
            self.constant(f"{node.name}/weight_step", step, "float32"),
        ]
        return self.add("DequantizeLinear", inputs, f"{node.name}/weight_real")

    def table(self, node: fx.Node, source: fx.Node, entries: Tensor, quantizer: StepQuantizer) -> None:
        """Look up each integer value of ``source`` in ``entries``."""
        index = self.add("Cast", [self.names[source]], f"{node.name}/index", to=self.onnx.TensorProto.INT32)
        values = self.constant(f"{node.name}/table", entries + zero_point(quantizer), "uint8")
        self.keep(node, self.add("Gather", [values, index], node.name), quantizer)

    def scale_constants(self, node: fx.Node, quantizer: StepQuantizer) -> list[str]:
        """Step size and zero point of ``node``, the step size named after the first node with this quantizer."""
        name = self._steps.setdefault(quantizer, f"{node.name}/step")
        return [self.constant(name, quantizer.step, "float32"), self.bound(0, quantizer)]

    def _packed(self, name: str, integers: np.ndarray) -> Any:
        """Two 4-bit weights to a byte, the first in the low half."""
        kind = getattr(self.onnx.TensorProto, "INT4", None)
        if kind is None:
            raise InputError(f'container="int4" needs onnx 1.16 or newer, this is {self.onnx.__version__}; update onnx')
        halves = np.append(integers.flatten().astype(np.int8), np.int8(0)).view(np.uint8) & 15
        pairs = halves[: 2 * ((integers.size + 1) // 2)].reshape(-1, 2)
        raw = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).tobytes()
        return self.onnx.TensorProto(name=name, data_type=kind, dims=integers.shape, raw_data=raw)


class FloatWriter(Writer):
    """The same network in floating point: float32 weights, and a ReLU for each unsigned quantizer."""

    def store(self, node: fx.Node, values: str, quantizer: StepQuantizer) -> None:
        self.keep(node, values if quantizer.signed else self.add("Relu", [values], node.name), None)

    def bound(self, value: int, quantizer: StepQuantizer) -> str:
        real = value * quantizer.step
        return self.constant(f"value/{float(real):.9g}", real, "float32")

    def layer_constants(self, node: fx.Node, layer: IntegerLayer) -> list[str]:
        integers, bias, steps = layer.integers()
        weight = integers * steps.reshape(-1, *[1] * (integers.ndim - 1))
        return [
            self.constant(f"{node.name}/weight", weight, "float32"),
            self.constant(f"{node.name}/bias", bias * layer.source.step * steps, "float32"),
        ]

    def average_weight(self, node: fx.Node, ones: Tensor, step: Tensor) -> str:
        return self.constant(f"{node.name}/weight", ones * step, "float32")

    def table(self, node: fx.Node, source: fx.Node, entries: Tensor, quantizer: StepQuantizer) -> None:
        raise InputError(f"{node.name} is a table of integer values, which has no floating-point form here")
