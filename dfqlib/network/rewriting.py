"""Normalize a traced graph: tensors are positional arguments, layers are modules, no operation is in place."""

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from dfqlib.network import kinds

__all__ = ["make_layers", "unused", "use_positions", "write_out_of_place"]

_F: Any = F  # the functional namespace is only partly typed
_IN_PLACE: dict[Any, Any] = {
    _F.relu_: F.relu, torch.relu_: torch.relu, operator.iadd: operator.add, operator.imul: operator.mul,
    operator.isub: operator.sub, operator.itruediv: operator.truediv,
}  # fmt: skip


_NAMES: dict[Any, tuple[str, ...]] = dict.fromkeys(
    kinds.CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
)
_NAMES |= dict.fromkeys(kinds.LINEARS, ("input", "weight", "bias"))
_NAMES |= dict.fromkeys(kinds.CATS, ("tensors", "dim"))
"""Parameters of functions that have no Python signature."""


def use_positions(root: nn.Module, nodes: fx.Graph) -> None:
    """Make tensors that are given by keyword positional arguments."""
    for node in nodes.nodes:
        if not any(isinstance(value, fx.Node) or name == "other" for name, value in node.kwargs.items()):
            continue
        given = dict(node.kwargs)
        try:
            if node.op == "call_module":
                names = tuple(inspect.signature(root.get_submodule(node.target).forward).parameters)
            elif node.target in _NAMES:
                names = _NAMES[node.target]
            else:
                names = tuple(inspect.signature(node.target).parameters)
        except (AttributeError, TypeError, ValueError):  # built in: its tensors bear these names
            names = ("input", "other") if "input" in given else ("self", "other")
        args = list(node.args)
        for name in names[len(args) :]:
            if name not in given:
                break
            args.append(given.pop(name))
        node.args, node.kwargs = tuple(args), given


def make_layers(root: nn.Module, nodes: fx.Graph) -> None:
    """Make layers of convolutions and matrix products that are called as functions with the network's own weights.

    The layer replaces the module that owns the weight, where that is a convolution or linear layer whose weight nothing
    else reads; otherwise it is a new submodule.
    """
    for node in list(nodes.nodes):
        is_product = node.op == "call_function" and node.target in (operator.matmul, torch.matmul)
        if node.op != "call_function" or not (node.target in kinds.CONVOLUTIONS | kinds.LINEARS or is_product):
            continue
        names = ("input", "weight") if is_product else _NAMES[node.target]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        source, weight_node, bias_node = given.pop("input", None), given.pop("weight", None), given.pop("bias", None)
        weight: Any = _constant(root, weight_node)
        bias: Any = _constant(root, bias_node)
        numbers = not any(isinstance(value, fx.Node) for value in pytree.tree_leaves(given))
        unknown = weight is None or (bias is None and bias_node is not None) or not numbers
        if unknown or not isinstance(source, fx.Node) or (is_product and weight.ndim != 2):
            continue
        weight = weight.T if is_product else weight
        layer: Any
        if node.target in kinds.CONVOLUTIONS:
            groups = given.get("groups", 1)
            layer = nn.Conv2d(
                weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]), bias=bias is not None,
                **{"stride": 1, "padding": 0, "dilation": 1} | given,
            )  # fmt: skip
        else:
            layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
        layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        name = _place_of(root, nodes, node, weight_node, type(layer))
        if name:
            for child, module in root.get_submodule(name).named_children():
                layer.add_module(child, module)
        else:
            name = unused(root, node.name)
        root.set_submodule(name, layer.train(root.training))
        with nodes.inserting_before(node):
            new = nodes.call_module(name, (source,))
        node.replace_all_uses_with(new)
        nodes.erase_node(node)
    for node in reversed(list(nodes.nodes)):
        if not node.users and _is_constant(node):
            nodes.erase_node(node)


def _place_of(root: nn.Module, nodes: fx.Graph, node: fx.Node, weight: Any, kind: type[nn.Module]) -> str | None:
    """The module whose place a layer with this weight can take: of its kind, and nothing else reads its tensors."""
    owners = {str(each.target).rpartition(".")[0] for each in _reads(weight)}
    name = owners.pop() if len(owners) == 1 else ""
    if not name or not isinstance(root.get_submodule(name), kind):
        return None
    called = any(each.op == "call_module" and each.target == name for each in nodes.nodes)
    readers = {
        user
        for each in nodes.nodes
        if each.op == "get_attr" and str(each.target).rpartition(".")[0] == name
        for user in _final_readers(each)
    }
    return None if called or readers - {node} else name


def _reads(node: Any) -> set[fx.Node]:
    """The parameters and buffers from which a constant is computed."""
    if not isinstance(node, fx.Node):
        return set()
    if node.op == "get_attr":
        return {node}
    return set().union(*map(_reads, node.all_input_nodes))


def _final_readers(node: fx.Node) -> set[fx.Node]:
    """The nodes that read a constant, directly or through other constants, and are none themselves."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= _final_readers(user) if _is_constant(user) else {user}
    return found


def _is_constant(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output", "call_module"):
        return False
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes)))


@torch.no_grad()
def _constant(root: nn.Module, node: Any) -> Tensor | None:
    """The value of a node that depends on parameters and buffers only; None for any other."""
    if not isinstance(node, fx.Node) or not _is_constant(node):
        return None
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(root.get_submodule(owner), name)
        return value if isinstance(value, Tensor) else None
    args: Any = fx.node.map_arg(node.args, lambda each: _constant(root, each))
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda each: _constant(root, each))
    function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    return function(*args, **kwargs)


def unused(root: nn.Module, name: str) -> str:
    """``name``, with underscores appended until it is free in ``root``."""
    while hasattr(root, name):
        name += "_"
    return name


def write_out_of_place(traced: fx.GraphModule) -> None:
    """Replace in-place operations; later readers of the overwritten tensor read the result."""
    modules = {node: traced.get_submodule(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"}
    overwriting = {node for node, module in modules.items() if getattr(module, "inplace", False)}
    for node in overwriting:
        modules[node].inplace = False  # type: ignore[assignment]
    earlier: set[fx.Node] = set()
    for given in list(traced.graph.nodes):
        node, target = given, _out_of_place(given)
        in_place = node in overwriting or target is not None or bool(node.kwargs.get("inplace"))
        if target is not None:  # a new node, so that its name is that of the new operation
            with traced.graph.inserting_after(given):
                node = traced.graph.create_node(given.op, target, given.args, given.kwargs)
            given.replace_all_uses_with(node)
            traced.graph.erase_node(given)
        earlier.add(node)
        if in_place and isinstance(node.args[0], fx.Node):
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
            for user in list(node.args[0].users):
                if user not in earlier:
                    user.replace_input_with(node.args[0], node)
    traced.recompile()


def _out_of_place(node: fx.Node) -> Any:
    """The out-of-place form of an in-place operation, such as ``relu`` for ``relu_``; None for others."""
    if node.op == "call_method":
        name = str(node.target)
        plain_name = name.removesuffix("_")
        return plain_name if plain_name != name and hasattr(Tensor, plain_name) and not name.startswith("__") else None
    return _IN_PLACE.get(node.target) if node.op == "call_function" else None
