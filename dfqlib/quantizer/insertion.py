"""Insert quantizers into a network: one for each weight, and one for each tensor that a layer reads.

Taught in notebook 07.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.errors import InputError
from dfqlib.network import graph
from dfqlib.network.convolution import convolve, kind_of
from dfqlib.quantizer.modules import AffineQuantizer, Mode, Quantizer, StepQuantizer
from dfqlib.spec import INPUT_BITS, QuantSpec


class QuantConv2d(nn.Conv2d):
    """A convolution whose weights pass through ``weight_quantizer``."""

    weight_quantizer: Quantizer

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x, self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """A linear layer whose weights pass through ``weight_quantizer``."""

    weight_quantizer: Quantizer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


_QUANTIZED: dict[Any, type[nn.Module]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}


def quantize_layers(model: nn.Module, spec: QuantSpec) -> fx.GraphModule:
    """A copy of ``model`` in which every conv and linear layer, and every tensor that one reads, has a quantizer.

    Each such tensor has one quantizer, whose output all operations read, the skip connection included unless
    ``spec.skip`` is "float". Quantizers pass values through unchanged until ``calibrate`` sets their ranges. Layers
    inside a submodule that cannot be traced get a signed quantizer at their own input. ``network.meta["unquantized"]``
    lists the modules with weights that stay in floating point, and ``network.meta["spec"]`` is the spec.

    Args:
        model: a classifier called with one tensor of shape (batch, channels, height, width); left as it is.
        spec: bit widths and scheme.

    Raises:
        InputError: the model has no Conv2d or Linear layer, or none of a name in ``spec.layers``.

    Taught in notebook 07.
    """
    network, opaque = graph.trace(model)
    calls = [node for node in network.graph.nodes if _runs_layers(node, opaque)]
    inside = [name for top in opaque for name in _layers_inside(network, top)]
    names = list(dict.fromkeys(name for node in calls for name in _layers_of(network, node)))
    if not names:
        raise InputError(f"model={type(model).__name__} has no Conv2d or Linear layer, so there is nothing to quantize")
    unknown = dict(spec.layers).keys() - set(names)
    if unknown:
        raise InputError(f'bits: no layer is called "{min(unknown)}"; the layers are {", ".join(names)}')
    edges = {names[0], names[-1]}
    for name in names:
        _quantize_weights(network.get_submodule(name), spec, spec.weight_bits_of(name, name in edges))
    _insert_activation_quantizers(network, calls, set(opaque), edges, spec)
    for name in inside:
        bits = spec.edge_bits if name in edges else spec.activation_bits
        layer = network.get_submodule(name)
        layer.input_quantizer = _activation_quantizer(bits, True, spec)
        layer.register_forward_pre_hook(_quantize_input)
    network.meta.update(spec=spec, unquantized=_unquantized(network))
    return network.eval()


def _runs_layers(node: fx.Node, opaque: list[str]) -> bool:
    return graph.operation(node) in _QUANTIZED or (node.op == "call_module" and node.target in opaque)


def _layers_of(network: nn.Module, node: fx.Node) -> list[str]:
    """The layer that a node calls, or those inside the opaque block that it calls, in order of definition."""
    name = str(node.target)
    return [name] if graph.operation(node) in _QUANTIZED else _layers_inside(network, name)


def _layers_inside(network: nn.Module, top: str) -> list[str]:
    modules = network.get_submodule(top).named_modules(prefix=top)
    return [name for name, module in modules if kind_of(module) in _QUANTIZED]


def _quantize_weights(layer: Any, spec: QuantSpec, bits: int) -> None:
    channels = layer.weight.shape[0] if spec.granularity == "channel" else None
    learned = spec.step == "learned"
    layer.__class__ = _QUANTIZED[kind_of(layer)]
    layer.weight_quantizer = (
        StepQuantizer(bits, signed=True, channels=channels, learned=learned)
        if spec.scheme == "symmetric"
        else AffineQuantizer(bits, channels=channels, learned=learned, follow=not learned)
    )


def _activation_quantizer(bits: int, signed: bool, spec: QuantSpec) -> Quantizer:
    learned = spec.step == "learned"
    if spec.scheme == "affine":
        return AffineQuantizer(bits, learned=learned)
    return StepQuantizer(bits, signed=signed, learned=learned)


def _insert_activation_quantizers(
    network: fx.GraphModule, calls: list[fx.Node], opaque: set[str], edges: set[str], spec: QuantSpec
) -> None:
    """Decide on signs and bit widths before the first insertion changes the graph."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for call in calls:
        source = call.args[0]
        if call.target not in opaque and isinstance(source, fx.Node):
            tensor = graph.stored_tensor(source) if spec.skip == "quantized" else source
            readers.setdefault(tensor, []).append(call)
    inputs = {tensor for tensor in readers if not _depends_on(tensor, set(calls))}
    unsigned = graph.non_negative(network.graph) - inputs
    for tensor, layers in readers.items():
        at_edge = {str(layer.target) for layer in layers} <= edges
        bits = INPUT_BITS if tensor in inputs else spec.edge_bits if at_edge else spec.activation_bits
        name = graph.unused(network, f"quantize_{tensor.name}")
        network.add_submodule(name, _activation_quantizer(bits, tensor not in unsigned, spec))
        with network.graph.inserting_after(tensor):
            quantized = network.graph.call_module(name, (tensor,))
        unaware = set(tensor.users) - set(layers) if spec.skip == "float" else set()
        for reader in set(tensor.users) - unaware - {quantized}:
            reader.replace_input_with(tensor, quantized)
    network.graph.lint()
    network.recompile()


def _depends_on(node: fx.Node, targets: set[fx.Node]) -> bool:
    seen, pending = set(), [node]
    while pending:
        node = pending.pop()
        if node in targets:
            return True
        pending += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return False


def _quantize_input(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.input_quantizer(args[0]), *args[1:])


def _unquantized(network: nn.Module) -> list[str]:
    """Modules that own a matrix or a tensor of more dimensions and have no quantizer."""
    return [
        name or type(network).__name__
        for name, module in network.named_modules()
        if not hasattr(module, "weight_quantizer") and any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]


def quantizers(network: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """All quantizers of a network with their names, such as "conv1.weight_quantizer" and "quantize_relu"."""
    return ((name, m) for name, m in network.named_modules() if isinstance(m, StepQuantizer | AffineQuantizer))


def set_mode(network: nn.Module, mode: Mode) -> None:
    """Set all quantizers to pass values through ("float"), set their ranges ("calibrate") or quantize ("quantize")."""
    for _, quantizer in quantizers(network):
        quantizer.mode = mode


@torch.no_grad()
def calibrate(network: nn.Module, images: Tensor, method: str = "mse", lower_bound: float = 0.0) -> None:
    """Set every range from one pass of ``images`` and leave the network quantizing.

    Args:
        network: what ``quantize_layers`` made, in eval mode.
        images: (batch, channels, height, width), normalized like the data.
        method: clipping method of step quantizers, one of ``clipping.METHODS``; affine ones take min and max.
        lower_bound: smallest threshold as a share of max|x| (DFQF: 0.3, its released code: 0.5).

    Taught in notebook 02.
    """
    for _, quantizer in quantizers(network):
        if isinstance(quantizer, StepQuantizer):
            quantizer.method, quantizer.lower_bound = method, lower_bound
    set_mode(network, "calibrate")
    network(images)
    set_mode(network, "quantize")


def check_steps(network: nn.Module) -> dict[str, float]:
    """The step size of each quantizer by name, averaged over its channels.

    Raises:
        InputError: a learned step size is not positive, or NaN; names the quantizer.
    """
    steps = {}
    for name, quantizer in quantizers(network):
        if not isinstance(quantizer, StepQuantizer):
            continue
        steps[name] = float(quantizer.step.detach().mean())
        if not bool((quantizer.step > 0).all()):
            raise InputError(
                f"the step of {name} became {quantizer.step.min().item():.3g}, but a step must stay positive: "
                "lower the step learning rate, or raise the lower bound of its threshold"
            )
    return steps


def parameter_groups(network: nn.Module, lr: float, step_lr: float) -> list[dict[str, Any]]:
    """Optimizer groups: weights at ``lr``; step sizes and bounds at ``step_lr``, without SGD's momentum and decay.

    As in DFQF's released code. Adam has moments for both groups.
    """
    ranges = {id(p) for _, quantizer in quantizers(network) for p in quantizer.parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in ranges], "lr": lr},
        {"params": [p for p in trained if id(p) in ranges], "lr": step_lr, "momentum": 0.0, "weight_decay": 0.0},
    ]
