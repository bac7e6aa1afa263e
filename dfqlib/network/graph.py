"""Trace a network as a graph of operations: which tensors exist, which operations read them, which can be negative.

Built on torch.fx, so that ``nn.ReLU`` and ``F.relu``, ``+`` and ``torch.add`` are all understood. A submodule that fx
cannot trace, for example one with control flow on values, is one opaque node.

Taught in notebook 07.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from dfqlib.errors import InputError
from dfqlib.network import kinds
from dfqlib.network.convolution import Unstrided, kind_of
from dfqlib.network.plain import plain
from dfqlib.network.rewriting import make_layers, unused, use_positions, write_out_of_place

__all__ = [
    "Run",
    "is_non_negative",
    "module_of",
    "non_negative",
    "operation",
    "shared_copy",
    "stored_tensor",
    "trace",
    "unused",
    "with_fixed_sizes",
]

_NEVER_BELOW_ZERO = ("nearest", "nearest-exact", "linear", "bilinear", "area")
"""Interpolation modes that average; bicubic ones overshoot."""


class _Tracer(fx.Tracer):
    """Traces user-written modules; those that cannot be traced become leaves, listed in ``opaque``."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: list[str] = []
        self.reasons: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kind = kind_of(m)  # a subclass that computes what its base does is that base
        torchs = kind.__module__.startswith("torch.nn.modules") and not issubclass(kind, nn.Sequential)
        return isinstance(m, Unstrided) or torchs or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """A network is called with images alone; other parameters of its forward have their defaults."""
        names = list(inspect.signature(root_fn).parameters)[1:]
        images = self.create_proxy("placeholder", names[0] if names and names[0].isidentifier() else "x", (), {})
        return root_fn, [self.root, images]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name) or m.__module__.startswith("torch.nn."):
            return super().call_module(m, forward, args, kwargs)
        last, opaque, depth = next(iter(reversed(self.graph.nodes))), len(self.opaque), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever a forward may raise when its tensors have no values
            self.reasons[name] = _first_line(error)
            for node in reversed(list(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.opaque[opaque:] = [name]
            while len(self.module_stack) > depth:  # where fx thinks it is: still inside
                self.module_stack.popitem(last=True)
            return self.create_proxy("call_module", name, args, kwargs)


class _Whole(nn.Module):
    """Calls a network as one submodule, so that a network that fx cannot trace becomes one node."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def trace(model: nn.Module) -> tuple[fx.GraphModule, list[str]]:
    """A deep copy of ``model`` as a graph in eval mode, and the names of its opaque submodules.

    In-place operations become out-of-place ones, so that each node's value is what its readers see. Module names stay
    those of the model; a network that cannot be traced at all is the single submodule "network".
    """
    copied = plain(model).eval()
    try:
        tracer = _Tracer()
        nodes = tracer.trace(copied)
    except Exception as error:  # as in call_module: the network's own forward needs values
        tracer, copied = _Tracer(), _Whole(copied)
        nodes = tracer.trace(copied)
        tracer.reasons.setdefault("network", _first_line(error))
    use_positions(copied, nodes)
    make_layers(copied, nodes)
    traced = fx.GraphModule(copied, nodes, type(model).__name__)
    write_out_of_place(traced)
    traced.meta["opaque"] = {name: tracer.reasons.get(name, "") for name in tracer.opaque}
    return traced.eval(), tracer.opaque


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class Run(fx.Interpreter):
    """One run of a graph on images of zeros; an error names the node and the shape of the images.

    Attributes:
        shapes: shape of each node's tensor.
        sizes: value of each node that is an integer or several, such as a shape.
    """

    def __init__(self, network: fx.GraphModule, batch: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(network)
        self.extra_traceback = False  # it would add lines to the message of an error
        self.image_shape = tuple(image_shape)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, Any] = {}
        place = next(network.parameters(), torch.empty(0)).device
        with torch.no_grad():
            self.run(torch.zeros(batch, *image_shape, device=place))

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{n.name} cannot take images of image_shape={self.image_shape} ({str(error).splitlines()[0]}); "
                "give the shape the network was made for"
            ) from error
        if isinstance(value, Tensor) and n.op != "output":
            self.shapes[n.name] = tuple(value.shape)
        elif n.op != "output" and all(isinstance(each, int) for each in pytree.tree_leaves(value)):
            self.sizes[n.name] = tuple(value) if isinstance(value, torch.Size) else value
        return value


def with_fixed_sizes(network: fx.GraphModule, image_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The same graph with constants for sizes that do not depend on the batch; modules are shared, names stay."""
    two, three = (Run(network, batch, image_shape).sizes for batch in (2, 3))
    result = shared_copy(network)
    for node in reversed(list(result.graph.nodes)):
        if node.name in two and two[node.name] == three[node.name]:
            value = two[node.name]
            for user in list(node.users):
                user.args = _replaced(user.args, node, value)
                user.kwargs = _replaced(user.kwargs, node, value)
            result.graph.erase_node(node)
    result.recompile()
    return result.train(network.training)


def shared_copy(network: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that shares the modules of ``network``; node names stay."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(network.graph, {}))
    result = fx.GraphModule(network, copied, type(network).__name__)
    result.meta.update(network.meta)
    return result


def _replaced(arguments: Any, node: fx.Node, value: Any) -> Any:
    return fx.node.map_arg(arguments, lambda each: value if each is node else each)


def operation(node: fx.Node) -> Any:
    """The operation of a node: a module's class, a function or a method's name; None for inputs and constants."""
    if node.op == "call_module":
        return kind_of(module_of(node))
    return node.target if node.op in ("call_function", "call_method") else None


def module_of(node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    root = node.graph.owning_module
    assert root is not None
    return root.get_submodule(str(node.target))


def stored_tensor(node: fx.Node) -> fx.Node:
    """The node that made the tensor of which ``node`` is a view (dropout in eval mode counts as one)."""
    while operation(node) in kinds.VIEWS:
        node = node.all_input_nodes[0]
    return node


def is_non_negative(node: fx.Node) -> bool:
    """Whether the structure guarantees that no element is negative: see ``non_negative``."""
    return node in non_negative(node.graph)


def non_negative(nodes: fx.Graph) -> set[fx.Node]:
    """The tensors of a traced graph that its structure keeps from being negative, such as sums of ReLUs."""
    found: set[fx.Node] = set()
    for node in nodes.nodes:
        if _is_non_negative(node, found):
            found.add(node)
    return found


def _is_non_negative(node: fx.Node, known: set[fx.Node]) -> bool:
    kind = operation(node)
    values = [value for value in pytree.tree_leaves((node.args, node.kwargs)) if value is not None]
    tensors = [value for value in values if isinstance(value, fx.Node)]
    sound = [value in known if isinstance(value, fx.Node) else _at_least_zero(value) for value in values]
    if kind in kinds.RELUS | kinds.POSITIVE:
        return True
    if kind in kinds.CLAMPS:
        return _lower_bound(node) >= 0 or tensors[0] in known
    if not tensors:
        return False
    if kind in kinds.RESIZES:
        given = dict(zip(("size", "scale_factor", "mode"), node.args[1:], strict=False)) | node.kwargs
        mode = getattr(module_of(node), "mode", None) if node.op == "call_module" else given.get("mode", "nearest")
        return tensors[0] in known and mode in _NEVER_BELOW_ZERO
    if kind in kinds.PADS | kinds.PAD_MODULES:
        fill = node.args[3] if kind is F.pad and len(node.args) > 3 else node.kwargs.get("value")
        fill = getattr(module_of(node), "value", 0) if node.op == "call_module" else fill
        return tensors[0] in known and (fill is None or _at_least_zero(fill))
    if kind in kinds.VIEWS | kinds.SELECTIONS:
        return tensors[0] in known
    if kind in kinds.MAXIMA:
        return any(value in known for value in tensors)
    if kind in kinds.PRODUCTS and len(node.args) == 2 and node.args[0] is node.args[1]:
        return True  # a square
    if kind in kinds.STACKS:
        return all(value in known for value in tensors)
    if kind in kinds.ADDS | kinds.PRODUCTS | kinds.QUOTIENTS | kinds.MINIMA:
        return all(sound)
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least_zero(value: Any) -> bool:
    return _is_number(value) and bool(value >= 0)


def _lower_bound(node: fx.Node) -> float:
    """The lower bound of a clamp; -inf where that is no number."""
    if node.op == "call_module":
        low: Any = getattr(module_of(node), "min_val", None)
    else:
        name = "min_val" if operation(node) is F.hardtanh else "min"
        default = -1.0 if operation(node) is F.hardtanh else None
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get(name, default)
    return float(low) if _is_number(low) else -math.inf
