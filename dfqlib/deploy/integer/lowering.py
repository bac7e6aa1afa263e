"""From a fake-quantized graph to a graph of integer operations, node by node.

==============================  =====================================  =====================
node                            becomes                                scale of its output
==============================  =====================================  =====================
quantizer                       Quantize, or Table from another scale  its own
conv, linear, BatchNorm         IntegerLayer                           output scale, or none
sum, product of two tensors     IntegerAdd, IntegerProduct             output scale
average pooling, mean           IntegerAverage                         output scale
function of each number         Table                                  output scale
concatenation                   itself, parts in one scale             output scale
ReLU, ReLU6                     Clamp                                  its input's
max pooling, slice, pad, view   itself                                 its input's
==============================  =====================================  =====================

The *output scale* of a node is that of the quantizer that reads it, if one quantizer alone does; otherwise that of a
quantizer of 8 bits of its own, ``store_<node>``. What is returned has none: logits are floating point.

Taught in notebook 10.
"""

from typing import Any, NamedTuple

from torch import cat, fx, nn

from dfqlib.deploy.integer.layer import IntegerLayer
from dfqlib.deploy.integer.operations import (
    Clamp,
    Dequantize,
    Function,
    IntegerAdd,
    IntegerAverage,
    IntegerProduct,
    Quantize,
    Table,
)
from dfqlib.errors import InputError
from dfqlib.network import graph, kinds
from dfqlib.quantizer import QuantConv2d, QuantLinear, StepQuantizer, quantizers
from dfqlib.quantizer.plain import without_quantizers

STORED_BITS = 8
"""Bit width of tensors that only an integer file quantizes, such as what enters a sum."""
PREFIX = "store_"


def prefix_in(network: nn.Module) -> str:
    """The prefix of the quantizers that only integers need; no other submodule has a name that begins with it."""
    prefix = PREFIX
    while any(name.startswith(prefix) and not isinstance(m, StepQuantizer) for name, m in network.named_children()):
        prefix += "_"
    return prefix


class Operand(NamedTuple):
    """A tensor of the integer graph: its node, and the name of the quantizer in whose scale its integer values are.

    The scale is None for a tensor in floating point: images and logits.
    """

    node: fx.Node
    scale: str | None


class Lowering:
    """One pass over a fake-quantized graph; ``lower`` writes the integer graph beside it.

    Attributes:
        operands: what each node of the fake-quantized graph became.
        added: the quantizers ``store_<node>`` by name; the network may have them already.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        shape = network.meta.get("image_shape")
        self.network = network if shape is None else graph.with_fixed_sizes(network, shape)
        self.root, self.graph = nn.Module(), fx.Graph()
        self.operands: dict[fx.Node, Operand] = {}
        self.sizes: dict[fx.Node, fx.Node] = {}
        self.added: dict[str, StepQuantizer] = {}
        self.prefix = prefix_in(self.network)
        self._scales: dict[fx.Node, str | None] = {}
        self._non_negative = {node.name for node in graph.non_negative(without_quantizers(self.network).graph)}

    def lower(self) -> fx.GraphModule:
        for node in self.network.graph.nodes:
            if node not in self.operands:  # a BatchNorm is lowered with its layer
                self._lower(node)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, "IntegerNetwork").eval()

    def _lower(self, node: fx.Node) -> None:
        kind = graph.operation(node)
        if node.op == "placeholder":
            self.operands[node] = Operand(self.graph.placeholder(str(node.target)), None)
        elif node.op == "output":
            self._output(node)
        elif self._is_size(node):
            self.sizes[node] = self.graph.node_copy(node, self._new)
        elif kind is StepQuantizer:
            self.operands[node] = self._integers(node.args[0], str(node.target))
        elif kind in (QuantConv2d, QuantLinear) or kind in kinds.BATCH_NORMS:
            self._layer(node)
        elif kind in kinds.ELEMENTWISE or (kind in kinds.ARITHMETIC and _has_number(node)):
            source, scale = self._integers(node.all_input_nodes[0])
            function = graph.module_of(node) if node.op == "call_module" else Function(node)
            self._append(node, Table(function, self._quantizer(scale), self._output_quantizer(node)), source)
        elif kind in kinds.ADDS:
            self._combine(node, IntegerAdd)
        elif kind in kinds.PRODUCTS:
            self._combine(node, IntegerProduct)
        elif kind in kinds.AVERAGES:
            self._average(node, kind)
        elif kind in kinds.NOTHING or getattr(kind, "__name__", "") in kinds.NOTHING_BY_NAME:
            self.operands[node] = self.operands[node.args[0]]  # type: ignore[index]
        elif kind in kinds.RELUS:
            self._relu(node, 6.0 if kind in kinds.RELU6 else None)
        elif kind in kinds.CATS:
            self._concatenate(node)
        elif kind in kinds.REARRANGEMENTS:
            self._rearrange(node, kind)
        else:
            raise _no_integer_form(node)

    def _layer(self, node: fx.Node) -> None:
        """A layer with the BatchNorm that alone reads it, or a BatchNorm without a layer."""
        layer: Any = None if graph.operation(node) in kinds.BATCH_NORMS else graph.module_of(node)
        last = node if layer is None or len(node.users) != 1 else next(iter(node.users))
        norm: Any = graph.module_of(last) if graph.operation(last) in kinds.BATCH_NORMS else None
        last = node if norm is None else last
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise InputError(f"{node.target}: padding_mode={layer.padding_mode!r} has no integer form; use zeros")
        if norm is not None and norm.running_mean is None:
            raise InputError(f"{last.target} has no running statistics to fold; train it with them")
        source, scale = self._integers(node.args[0])
        output_scale = self._scale_of_readers(last)
        target = None if output_scale is None else self._quantizer(output_scale)
        new = self._call(node.name, IntegerLayer(str(node.target), layer, norm, self._quantizer(scale), target), source)
        self.operands[node] = self.operands[last] = Operand(new, output_scale)

    def _combine(self, node: fx.Node, operation: type[IntegerAdd] | type[IntegerProduct]) -> None:
        terms = node.args
        if len(terms) != 2 or not all(isinstance(term, fx.Node) for term in terms) or node.kwargs.get("alpha", 1) != 1:
            raise _no_integer_form(node)
        (a, scale_a), (b, scale_b) = (self._integers(term) for term in terms)
        sources = self._quantizer(scale_a), self._quantizer(scale_b)
        self._append(node, operation(*sources, self._output_quantizer(node)), a, b)

    def _average(self, node: fx.Node, kind: Any) -> None:
        pool: Any
        keepdim = True
        if node.op == "call_module":
            pool = graph.module_of(node)
        elif kind in kinds.MEANS:
            given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
            dims: Any = given.get("dim", given.get("axis")) or ()
            if sorted(dim % 4 for dim in (dims if isinstance(dims, tuple | list) else [dims])) != [2, 3]:
                raise _no_integer_form(node)
            pool, keepdim = nn.AdaptiveAvgPool2d(1), bool(given.get("keepdim", False))
        else:
            _require_known_sizes(node)
            build: Any = nn.AdaptiveAvgPool2d if kind in kinds.ADAPTIVE else nn.AvgPool2d
            pool = build(*node.args[1:], **node.kwargs)
        padded = getattr(pool, "padding", 0) not in (0, (0, 0)) and not pool.count_include_pad
        if padded or getattr(pool, "ceil_mode", False) or getattr(pool, "divisor_override", None):
            raise InputError(
                f"{_name(node)}: average pooling over partial windows has no integer form; "
                "use count_include_pad=True and ceil_mode=False"
            )
        source, scale = self._integers(node.args[0])
        quantizer, target = self._quantizer(scale), self._output_quantizer(node)
        self._append(node, IntegerAverage(_name(node), pool, quantizer, target, keepdim), source)

    def _relu(self, node: fx.Node, ceiling: float | None) -> None:
        source, scale = self._integers(node.args[0])
        quantizer = self._quantizer(scale)
        if quantizer.signed or ceiling is not None:  # unsigned values have nothing for a ReLU to cut
            source = self._call(node.name, Clamp(quantizer, ceiling), source)
        self.operands[node] = Operand(source, scale)

    def _concatenate(self, node: fx.Node) -> None:
        given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
        tensors: Any = given["tensors"]
        scale = self._output_scale(node)
        parts = [self._integers(tensor, scale).node for tensor in tensors]
        self.operands[node] = Operand(self.graph.call_function(cat, (parts, given.get("dim", 0))), scale)

    def _rearrange(self, node: fx.Node, kind: Any) -> None:
        source = node.all_input_nodes[0]
        if kind in kinds.PADS:
            given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
            if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
                raise InputError(f"{_name(node)}: padding with anything but zeros has no integer form; pad with zeros")
        if kind in kinds.MAX_POOLS:
            _require_known_sizes(node)
            self.operands[source] = self._integers(source)
        new = self.graph.node_copy(node, self._new)
        if node.op == "call_module":
            self.root.add_module(node.name, graph.module_of(node))
            new.target = node.name
        self.operands[node] = Operand(new, self.operands[source].scale)

    def _output(self, node: fx.Node) -> None:
        (result,) = node.args
        if not isinstance(result, fx.Node) or result not in self.operands:
            raise InputError("model returns more than one tensor; wrap it so that it returns its logits alone")
        new, scale = self.operands[result]
        if scale is not None:
            new = self._call("dequantized", Dequantize(self._quantizer(scale)), new)
        self.graph.output(new)

    def _integers(self, node: Any, scale: str | None = None) -> Operand:
        """The tensor of ``node`` as integer values, in the named scale if one is named, else in the one it has."""
        if not isinstance(node, fx.Node) or node not in self.operands:
            raise InputError(f"{node} is a constant inside the network, which has no integer form; make it a layer")
        value, now = self.operands[node]
        if now is None:
            scale = scale or self.prefix + node.name
            return Operand(self._call(f"{node.name}_codes", Quantize(self._quantizer(scale)), value), scale)
        if scale is None or scale == now:
            return Operand(value, now)
        requantize = Table(nn.Identity(), self._quantizer(now), self._quantizer(scale))
        return Operand(self._call(f"{node.name}_on_{scale}", requantize, value), scale)

    def _output_quantizer(self, node: fx.Node) -> StepQuantizer:
        return self._quantizer(self._output_scale(node))

    def _output_scale(self, node: fx.Node) -> str:
        """The scale of ``node``'s integer values; of its own where its readers take floating point."""
        return self._scale_of_readers(node) or self.prefix + node.name

    def _scale_of_readers(self, node: fx.Node) -> str | None:
        """The one scale that all readers take ``node`` in, else one of its own; None where it is the output."""
        if node not in self._scales:
            wanted = {self._scale_wanted_by(user, node) for user in node.users if not self._is_size(user)}
            self._scales[node] = wanted.pop() if len(wanted) == 1 else self.prefix + node.name
        return self._scales[node]

    def _scale_wanted_by(self, user: fx.Node, node: fx.Node) -> str | None:
        kind = graph.operation(user)
        if user.op == "output":
            return None
        if kind is StepQuantizer:
            return str(user.target)
        if kind not in kinds.COMMUTING:
            return self.prefix + node.name
        scale = self._scale_of_readers(user)
        return scale if kind in kinds.VIEWS else scale or self.prefix + user.name

    def _quantizer(self, name: str | None) -> StepQuantizer:
        """The quantizer of that name, made (for ``integer.attach`` to insert) where the network has none."""
        assert name is not None
        if not name.startswith(self.prefix):
            found: Any = self.network.get_submodule(name)
            return found
        if name not in self.added:
            there = getattr(self.network, name, None)
            self.added[name] = there if isinstance(there, StepQuantizer) else self._new_quantizer(name)
        return self.added[name]

    def _new_quantizer(self, name: str) -> StepQuantizer:
        steps = [parameter for _, quantizer in quantizers(self.network) for parameter in quantizer.parameters()]
        signed = name.removeprefix(self.prefix) not in self._non_negative
        learned = any(step.requires_grad for step in steps)
        return StepQuantizer(STORED_BITS, signed=signed, learned=learned).to(steps[0].device)

    def _is_size(self, node: fx.Node) -> bool:
        """Whether ``node`` is a number made of shapes rather than a tensor."""
        kind = graph.operation(node)
        if kind is getattr:
            return node.args[1] in kinds.SIZE_ATTRIBUTES
        if kind in kinds.SIZES:
            return True
        sources = node.all_input_nodes
        return node.op != "output" and bool(sources) and all(source in self.sizes for source in sources)

    def _new(self, node: fx.Node) -> fx.Node:
        return self.sizes[node] if node in self.sizes else self.operands[node].node

    def _call(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        name = graph.unused(self.root, name)
        self.root.add_module(name, module)
        return self.graph.create_node("call_module", name, args, {}, name)

    def _append(self, node: fx.Node, module: nn.Module, *args: fx.Node) -> None:
        self.operands[node] = Operand(self._call(node.name, module, *args), self._output_scale(node))


def _has_number(node: fx.Node) -> bool:
    return len(node.args) == 2 and any(isinstance(term, int | float) for term in node.args)


def _require_known_sizes(node: fx.Node) -> None:
    if len(node.all_input_nodes) > 1:
        raise InputError(f"{_name(node)} takes sizes that depend on the batch, which has no integer form; use numbers")


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _no_integer_form(node: fx.Node) -> InputError:
    kind = graph.operation(node)
    reason = getattr(node.graph.owning_module, "meta", {}).get("opaque", {}).get(str(node.target))
    if reason is not None:
        return InputError(
            f"{_name(node)} cannot be traced ({reason}), so it has no integer form; write its forward without "
            "decisions about values, or keep the fake-quantized network"
        )
    called = getattr(kind, "__name__", str(kind)) if kind is not None else f'the constant "{node.target}"'
    return InputError(
        f"{_name(node)} ({called}) has no integer form; replace it by convolutions, linear layers, sums, pooling and "
        "functions of one tensor, or keep the fake-quantized network"
    )
