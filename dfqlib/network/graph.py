"""What a network computes, as a graph: which tensors exist, who reads them, which can be negative.

Built on torch.fx, so that nothing about an architecture is assumed: ``nn.ReLU`` or ``F.relu``, ``+`` or
``torch.add``. A submodule that fx cannot follow (control flow on values, for example) stays one opaque node.

Taught in notebook 07.
"""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.network.convolution import Unstrided, kind_of

_F: Any = F  # the functional namespace is only partly typed
Operations = set[Any]  # module classes, functions, method names
RELU: Operations = {nn.ReLU, nn.ReLU6, F.relu, F.relu6, _F.relu_, torch.relu, "relu", "relu_"}
NON_NEGATIVE: Operations = RELU | {
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softmax,
    nn.Softplus,
    F.sigmoid,
    F.hardsigmoid,
    F.softmax,
}
NON_NEGATIVE |= {
    torch.sigmoid,
    torch.softmax,
    torch.abs,
    torch.exp,
    F.softplus,
    "sigmoid",
    "softmax",
    "abs",
    "exp",
}
VIEWS: Operations = {nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, torch.flatten, F.dropout, F.dropout2d}
VIEWS |= {"flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze", torch.squeeze, torch.unsqueeze}
SELECTIONS: Operations = {
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.ChannelShuffle,
}
SELECTIONS |= {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, F.pad}
SELECTIONS |= {
    operator.getitem,
    torch.mean,
    "mean",
    torch.transpose,
    "transpose",
    "permute",
    torch.chunk,
    "chunk",
}
SELECTIONS |= {torch.split, "split", "repeat", "expand"}
COMBINATIONS: Operations = {
    operator.add,
    operator.mul,
    operator.iadd,
    torch.add,
    torch.mul,
    torch.cat,
    torch.maximum,
    "add",
    "mul",
}
IN_PLACE = {_F.relu_: F.relu, "relu_": "relu", "add_": "add", "mul_": "mul"}


class _Tracer(fx.Tracer):
    """Follows user-written modules as far as it can; the rest become leaves, listed in ``opaque``."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Unstrided) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name) or m.__module__.startswith("torch.nn."):
            return super().call_module(m, forward, args, kwargs)
        last, opaque = next(iter(reversed(self.graph.nodes))), len(self.opaque)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever a forward may raise when its tensors have no values
            for node in reversed(list(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.opaque[opaque:] = [name]
            return self.create_proxy("call_module", name, args, kwargs)


class _Whole(nn.Module):
    """Calls a network as one submodule, so that even a network fx cannot enter becomes a node."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def trace(model: nn.Module) -> tuple[fx.GraphModule, list[str]]:
    """A deep copy of ``model`` as a graph in eval mode, and the names of submodules that could not be followed.

    In-place activations are written out of place, with later readers of the overwritten tensor redirected, so that
    each node's value is what its readers see. Module names stay those of the model; a network that cannot be
    followed at all is the single submodule "network".

    Args:
        model: a network called with one tensor.
    """
    copied = copy.deepcopy(model).eval()
    try:
        tracer = _Tracer()
        traced = fx.GraphModule(copied, tracer.trace(copied), type(model).__name__)
    except Exception:  # as in call_module: the network's own forward needs values
        tracer, copied = _Tracer(), _Whole(copied)
        traced = fx.GraphModule(copied, tracer.trace(copied), type(model).__name__)
    _write_out_of_place(traced)
    return traced.eval(), tracer.opaque


def operation(node: fx.Node) -> Any:
    """What a node does: the module's class, the function, or the method's name; None for inputs and constants."""
    if node.op == "call_module":
        return kind_of(module_of(node))
    return node.target if node.op in ("call_function", "call_method") else None


def module_of(node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    root = node.graph.owning_module
    assert root is not None
    return root.get_submodule(str(node.target))


def _write_out_of_place(traced: fx.GraphModule) -> None:
    for node in traced.graph.nodes:
        in_place = operation(node) in IN_PLACE or bool(node.kwargs.get("inplace"))
        if in_place:
            node.target = IN_PLACE.get(node.target, node.target)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        if node.op == "call_module" and getattr(module_of(node), "inplace", False):
            module_of(node).inplace, in_place = False, True  # type: ignore[assignment]
        if in_place:
            earlier = {node, *_before(node)}
            node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, seen=earlier: user not in seen)
    traced.recompile()


def _before(node: fx.Node) -> list[fx.Node]:
    nodes = list(node.graph.nodes)
    return nodes[: nodes.index(node)]


def stored_tensor(node: fx.Node) -> fx.Node:
    """The node that made the tensor in memory that ``node`` shows: reshapes and dropout in eval make no new one."""
    while operation(node) in VIEWS:
        node = node.all_input_nodes[0]
    return node


def is_non_negative(node: fx.Node) -> bool:
    """Whether the structure guarantees that no element is negative: after a ReLU, pooled, padded or summed of such."""
    kind, sources = operation(node), node.all_input_nodes
    if kind in NON_NEGATIVE:
        return True
    if kind in VIEWS | SELECTIONS:
        fill = node.args[3] if kind is F.pad and len(node.args) > 3 else node.kwargs.get("value")
        return is_non_negative(sources[0]) and (not isinstance(fill, int | float) or fill >= 0)
    if kind in COMBINATIONS:
        numbers = [value for value in node.args if isinstance(value, int | float)]
        return bool(sources) and all(map(is_non_negative, sources)) and min(numbers, default=0) >= 0
    return False
