"""From a fake-quantized graph to a graph of integer operations.

Taught in notebook 10.
"""

from typing import Any

import torch
from torch import fx, nn

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
"""Width of tensors that only an integer file has to store, such as what enters a sum."""
PREFIX = "store_"
_LAYERS = {QuantConv2d, QuantLinear}
LOGITS = ""
"""Stands for floating point among the names of grids."""


def prefix_in(network: nn.Module) -> str:
    """What the names of grids begin with that only integers need: nothing else in the network begins so."""
    prefix = PREFIX
    while any(name.startswith(prefix) and not isinstance(m, StepQuantizer) for name, m in network.named_children()):
        prefix += "_"
    return prefix


class Lowering:
    """One pass over a fake-quantized graph; ``lower`` writes the integer graph beside it.

    A value of the new graph is a pair: its node, and the name of the grid its codes are on (LOGITS: it is floating
    point). A grid is a quantizer of the network; those of tensors that no layer reads are named ``store_<node>``, and
    those that the network lacks are in ``stores`` too.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        shape = network.meta.get("image_shape")
        self.network = network = network if shape is None else graph.with_fixed_sizes(network, shape)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, tuple[fx.Node, str]] = {}
        self.sizes: dict[fx.Node, fx.Node] = {}
        self.stores: dict[str, StepQuantizer] = {}
        self.prefix = prefix_in(network)
        self.asked: dict[fx.Node, str] = {}
        unsigned = graph.non_negative(without_quantizers(network).graph)
        self.unsigned = {node.name for node in unsigned}

    def lower(self) -> fx.GraphModule:
        for node in self.network.graph.nodes:
            if node not in self.values:
                self._lower(node)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, "IntegerNetwork").eval()

    def _lower(self, node: fx.Node) -> None:
        kind = graph.operation(node)
        if node.op == "placeholder":
            self.values[node] = self.graph.placeholder(str(node.target)), LOGITS
        elif node.op == "output":
            self._output(node)
        elif self._is_size(node):
            self.sizes[node] = self.graph.node_copy(node, self._new)
        elif kind is StepQuantizer:
            self.values[node] = self._codes(node.args[0], str(node.target))
        elif kind in _LAYERS:
            self._layer(node)
        elif _is_batch_norm(node):
            self._write_layer(node, None, node)
        elif kind in kinds.ELEMENTWISE or (kind in kinds.ARITHMETIC and _has_number(node)):
            source, grid = self._codes(node.all_input_nodes[0])
            function = graph.module_of(node) if node.op == "call_module" else Function(node)
            self._write(node, Table(function, self.grid(grid), self._target(node)), source)
        elif kind in kinds.ADDS:
            self._combine(node, IntegerAdd)
        elif kind in kinds.PRODUCTS:
            self._combine(node, IntegerProduct)
        elif kind in kinds.AVERAGES:
            self._average(node, kind)
        elif kind in kinds.NOTHING or getattr(kind, "__name__", "") in kinds.NOTHING_BY_NAME:
            self.values[node] = self.values[node.args[0]]  # type: ignore[index]
        elif kind in kinds.RELUS:
            self._relu(node, 6.0 if kind in kinds.RELU6 else None)
        elif kind in kinds.CATS:
            self._cat(node)
        elif kind in kinds.MOVES:
            self._move(node)
        else:
            raise _no_integer_form(node)

    def _layer(self, node: fx.Node) -> None:
        users = list(node.users)
        norm = users[0] if len(users) == 1 and _is_batch_norm(users[0]) else None
        self._write_layer(node, node, norm)

    def _write_layer(self, node: fx.Node, layer: fx.Node | None, norm: fx.Node | None) -> None:
        """A layer, its BatchNorm or both as one integer layer; ``node`` is the first of them."""
        conv: Any = None if layer is None else graph.module_of(layer)
        batch_norm: Any = None if norm is None else graph.module_of(norm)
        if conv is not None and getattr(conv, "padding_mode", "zeros") != "zeros":
            raise InputError(f"{node.target}: padding_mode={conv.padding_mode!r} has no integer form; use zeros")
        if norm is not None and batch_norm.running_mean is None:
            raise InputError(f"{norm.target} has no running statistics to fold; train it with them")
        last = norm or node
        source, grid = self._codes(node.args[0])
        asked = self._asked(last)
        target = None if asked == LOGITS else self.grid(asked)
        new = self._call(node.name, IntegerLayer(str(node.target), conv, batch_norm, self.grid(grid), target), source)
        self.values[node] = self.values[last] = new, asked

    def _combine(self, node: fx.Node, operation: type[IntegerAdd] | type[IntegerProduct]) -> None:
        terms = node.args
        if len(terms) != 2 or not all(isinstance(term, fx.Node) for term in terms) or node.kwargs.get("alpha", 1) != 1:
            raise _no_integer_form(node)
        (a, grid_a), (b, grid_b) = (self._codes(term) for term in terms)
        self._write(node, operation(self.grid(grid_a), self.grid(grid_b), self._target(node)), a, b)

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
            build: Any = nn.AdaptiveAvgPool2d if kind in kinds.ADAPTIVE else nn.AvgPool2d
            pool = build(*self._numbers(node), **node.kwargs)
        padded = getattr(pool, "padding", 0) not in (0, (0, 0)) and not pool.count_include_pad
        if padded or getattr(pool, "ceil_mode", False) or getattr(pool, "divisor_override", None):
            raise InputError(
                f"{_name(node)}: average pooling over partial windows has no integer form; "
                "use count_include_pad=True and ceil_mode=False"
            )
        source, grid = self._codes(node.args[0])
        average = IntegerAverage(_name(node), pool, self.grid(grid), self._target(node), keepdim)
        self._write(node, average, source)

    def _numbers(self, node: fx.Node) -> tuple[Any, ...]:
        """The arguments after the tensor, which must be known by now."""
        if len(node.all_input_nodes) > 1:
            raise InputError(
                f"{_name(node)} takes sizes that depend on the batch, which has no integer form; use numbers"
            )
        return node.args[1:]

    def _relu(self, node: fx.Node, ceiling: float | None) -> None:
        source, grid = self._codes(node.args[0])
        if self.grid(grid).signed or ceiling is not None:  # unsigned codes are their own ReLU
            source = self._call(node.name, Clamp(self.grid(grid), ceiling), source)
        self.values[node] = source, grid

    def _cat(self, node: fx.Node) -> None:
        given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
        grid = self._stored(node)
        parts: Any = given["tensors"]
        new = self.graph.call_function(torch.cat, ([self._codes(part, grid)[0] for part in parts], given.get("dim", 0)))
        self.values[node] = new, grid

    def _move(self, node: fx.Node) -> None:
        kind, source = graph.operation(node), node.all_input_nodes[0]
        if kind in kinds.PADS:
            given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
            if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
                raise InputError(f"{_name(node)}: padding with anything but zeros has no integer form; pad with zeros")
        if kind in kinds.MAX_POOLS:
            self._numbers(node)
        if kind in kinds.MAX_POOLS and self.values[source][1] == LOGITS:
            self.values[source] = self._codes(source)
        new = self.graph.node_copy(node, self._new)
        if node.op == "call_module":
            self.root.add_module(node.name, graph.module_of(node))
            new.target = node.name
        self.values[node] = new, self.values[source][1]

    def _output(self, node: fx.Node) -> None:
        (result,) = node.args
        if not isinstance(result, fx.Node) or result not in self.values:
            raise InputError("model returns more than one tensor; wrap it so that it returns its logits alone")
        new, grid = self.values[result]
        if grid != LOGITS:
            new = self._call("dequantized", Dequantize(self.grid(grid)), new)
        self.graph.output(new)

    def _codes(self, node: Any, wanted: str | None = None) -> tuple[fx.Node, str]:
        """``node``'s value as codes, on the grid ``wanted`` if one is named."""
        if not isinstance(node, fx.Node) or node not in self.values:
            raise InputError(f"{node} is a constant inside the network, which has no integer form; make it a layer")
        value, grid = self.values[node]
        if grid == LOGITS:
            wanted = wanted or self.prefix + node.name
            return self._call(f"{node.name}_codes", Quantize(self.grid(wanted)), value), wanted
        if wanted in (None, grid):
            return value, grid
        assert wanted is not None
        change = Table(nn.Identity(), self.grid(grid), self.grid(wanted))
        return self._call(f"{node.name}_on_{wanted}", change, value), wanted

    def _target(self, node: fx.Node) -> StepQuantizer:
        return self.grid(self._stored(node))

    def _stored(self, node: fx.Node) -> str:
        """The grid of ``node``'s codes."""
        return self._asked(node) or self.prefix + node.name

    def _asked(self, node: fx.Node) -> str:
        """The one grid that all readers want ``node`` on, else one of its own; LOGITS when it is the output."""
        if node not in self.asked:
            self.asked[node] = self._ask(node)
        return self.asked[node]

    def _ask(self, node: fx.Node) -> str:
        asked = set()
        for user in node.users:
            kind = graph.operation(user)
            if user.op == "output":
                asked.add(LOGITS)
            elif kind is StepQuantizer:
                asked.add(str(user.target))
            elif kind in kinds.KEEPS and not self._is_size(user):
                keeps = self._asked(user)
                asked.add(keeps if keeps != LOGITS or kind in kinds.VIEWS else self.prefix + user.name)
            elif not self._is_size(user):
                asked.add(self.prefix + node.name)
        return asked.pop() if len(asked) == 1 else self.prefix + node.name

    def grid(self, name: str) -> StepQuantizer:
        """The quantizer of that name, made (for the caller to insert) where the network has none."""
        if name.startswith(self.prefix) and name not in self.stores:
            there = getattr(self.network, name, None)
            known = isinstance(there, StepQuantizer)
            self.stores[name] = there if known else self._new_grid(name.removeprefix(self.prefix))  # type: ignore[assignment]
        found = self.stores[name] if name in self.stores else self.network.get_submodule(name)
        assert isinstance(found, StepQuantizer)
        return found

    def _new_grid(self, node: str) -> StepQuantizer:
        steps = [parameter for _, quantizer in quantizers(self.network) for parameter in quantizer.parameters()]
        learned = any(step.requires_grad for step in steps)
        return StepQuantizer(STORED_BITS, signed=node not in self.unsigned, learned=learned).to(steps[0].device)

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
        return self.sizes[node] if node in self.sizes else self.values[node][0]

    def _call(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        while hasattr(self.root, name):
            name += "_"
        self.root.add_module(name, module)
        return self.graph.create_node("call_module", name, args, {}, name)

    def _write(self, node: fx.Node, module: nn.Module, *args: fx.Node) -> None:
        self.values[node] = self._call(node.name, module, *args), self._stored(node)


def _has_number(node: fx.Node) -> bool:
    return len(node.args) == 2 and any(isinstance(term, int | float) for term in node.args)


def _is_batch_norm(node: fx.Node) -> bool:
    return graph.operation(node) in kinds.BATCH_NORMS


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _no_integer_form(node: fx.Node) -> InputError:
    kind = graph.operation(node)
    root = node.graph.owning_module
    reason = getattr(root, "meta", {}).get("opaque", {}).get(str(node.target))
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
