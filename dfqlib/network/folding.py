"""Fold BatchNorm and keep the architecture: all layers and tensors of the model keep their names and shapes.

The weights take BatchNorm's scale; the layer stays, with scale 1, and adds only the bias. So a folded network can be
quantized, saved and rebuilt like the model.

Taught in notebook 02.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.errors import InputError
from dfqlib.network import graph, kinds
from dfqlib.network.convolution import kind_of

Relu6 = Literal["keep", "replace"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A conv or linear layer that is called once, with the BatchNorm layer after it.

    Attributes:
        node: the call of ``module``.
        module: with weight (out, in / groups, ...).
        norm: the BatchNorm layer that alone reads its output, or None.
        output: the node of ``norm``, or ``node``.
    """

    node: fx.Node
    module: Any
    norm: Any
    output: fx.Node

    @property
    def name(self) -> str:
        """Name of ``module`` in the network."""
        return str(self.node.target)

    @property
    def channels(self) -> int:
        """Output channels."""
        return int(self.module.weight.shape[0])

    @torch.no_grad()
    def shift(self, amount: Tensor) -> None:
        """Add (channels,) to the output before BatchNorm: in the bias, in BatchNorm's mean, or as a new bias."""
        if self.module.bias is not None:
            self.module.bias.add_(amount)
        elif self.norm is not None:
            self.norm.running_mean.sub_(amount)
        else:
            self.module.bias = nn.Parameter(amount.to(self.module.weight), self.module.weight.requires_grad)

    def bias(self) -> Tensor:
        """The effective bias of a layer with its BatchNorm folded, (channels,)."""
        own = self.module.weight.new_zeros(self.channels) if self.module.bias is None else self.module.bias.detach()
        return own if self.norm is None else own - self.norm.running_mean

    @torch.no_grad()
    def scale_outputs(self, factors: Tensor) -> None:
        """Multiply the outputs of a layer with its BatchNorm folded by ``factors``, (channels,), in place."""
        self.module.weight.mul_(per_channel(factors, self.module.weight))
        for bias in (self.module.bias, None if self.norm is None else self.norm.running_mean):
            if bias is not None:
                bias.mul_(factors)

    @torch.no_grad()
    def scale_inputs(self, factors: Tensor) -> None:
        """Multiply the weights that read input channel c by ``factors[c]``, (input channels,), in place."""
        weight = self.module.weight
        scaled = self.by_input(weight, len(factors)) * factors.view(self.groups, 1, -1, 1)
        weight.copy_(scaled.reshape(weight.shape))

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 for a linear layer."""
        return int(getattr(self.module, "groups", 1))

    def by_input(self, weight: Tensor, channels: int) -> Tensor:
        """A tensor like the layer's weight as (groups, outputs, inputs, positions).

        Input channel c is ``[c // inputs, :, c % inputs]``; the positions are those of a kernel or of flattened pixels.
        """
        return weight.reshape(self.groups, weight.shape[0] // self.groups, channels // self.groups, -1)

    def response(self, weight: Tensor, means: Tensor) -> Tensor:
        """The output (channels,) for constant inputs (input channels,), padding included, with the given ``weight``."""
        by_input = self.by_input(weight, len(means)).sum(3)
        return by_input.matmul(means.to(weight).view(self.groups, -1, 1)).flatten()


@dataclass(frozen=True, eq=False)
class Folded:
    """A network whose BatchNorm layers only add a bias.

    Attributes:
        network: the graph, with the module and tensor names of the model.
        layers: those called once, by name.
        statistics: mean and standard deviation of each BatchNorm layer's outputs, (channels,) each, by name.
    """

    network: fx.GraphModule
    layers: dict[str, Layer]
    statistics: dict[str, tuple[Tensor, Tensor]]


def find_layers(network: fx.GraphModule) -> dict[str, Layer]:
    """The conv and linear layers of a graph that are called once, quantized or not, by name."""
    calls = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
    found = {}
    for node in network.graph.nodes:
        if node.op != "call_module" or calls.count(str(node.target)) > 1:
            continue
        module: Any = graph.module_of(node)
        if graph.operation(node) in kinds.LAYERS or hasattr(module, "weight_quantizer"):
            reader = next(iter(node.users)) if len(node.users) == 1 else node
            norm: Any = graph.module_of(reader) if graph.operation(reader) in kinds.BATCH_NORMS else None
            folds = norm is not None and norm.running_mean is not None and calls.count(str(reader.target)) == 1
            found[str(node.target)] = Layer(node, module, norm if folds else None, reader if folds else node)
    return found


@torch.no_grad()
def fold(model: nn.Module, relu6: Relu6 = "keep") -> Folded:
    """A copy of a network with the scale of each BatchNorm layer multiplied into the weights before it.

    The layer stays, with scale 1 and variance 1, and adds the bias. The FP32 output is unchanged to rounding (unless
    ReLU6 are replaced).

    Args:
        model: a classifier; left as it is.
        relu6: "replace" turns each ReLU6 into a ReLU, as the paper does for MobileNetV2, so that channels can be scaled
            across it; the output changes where a value was above 6.

    Taught in notebook 02.
    """
    network, _ = graph.trace(rebuild(model, {"relu6": relu6}))
    layers = find_layers(network)
    statistics = {
        name: (_clone(norm.bias, norm.running_mean, 0.0), _clone(norm.weight, norm.running_mean, 1.0).abs())
        for name, norm in network.named_modules()
        if kind_of(norm) in kinds.BATCH_NORMS and norm.running_mean is not None
    }
    for layer in layers.values():
        if layer.norm is not None:
            _fold(layer)
    return Folded(network, layers, statistics)


def merge(model: nn.Module) -> fx.GraphModule:
    """A copy of a network without the BatchNorm layers that ``fold`` folds; their biases are in the layers before.

    Raises:
        InputError: the network cannot be traced.

    Taught in notebook 10.
    """
    folded = fold(model)
    if not any(node.op == "call_module" and node.target != "network" for node in folded.network.graph.nodes):
        raise InputError(f"model={type(model).__name__} cannot be traced by torch.fx, which folding needs")
    for layer in folded.layers.values():
        if layer.norm is not None:
            layer.module.bias = nn.Parameter(layer.bias().clone(), layer.module.weight.requires_grad)
            layer.output.replace_all_uses_with(layer.node)
            folded.network.graph.erase_node(layer.output)
    folded.network.delete_all_unused_submodules()
    folded.network.recompile()
    return folded.network


def _clone(values: Tensor | None, like: Any, default: float) -> Tensor:
    return torch.full_like(like, default) if values is None else values.detach().clone()


def _fold(layer: Layer) -> None:
    norm, module = layer.norm, layer.module
    scale = _clone(norm.weight, norm.running_mean, 1.0) / (norm.running_var + norm.eps).sqrt()
    bias = scale * (layer.bias()) + _clone(norm.bias, norm.running_mean, 0.0)
    module.weight.mul_(per_channel(scale, module.weight))
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    for parameter, value in ((norm.weight, 1.0), (norm.bias, 0.0)):
        if parameter is not None:
            parameter.fill_(value)
    if module.bias is not None:
        module.bias.zero_()
    layer.shift(bias)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View (channels,) against a weight of shape (channels, ...); a single value stays one."""
    return values.reshape(-1, *[1] * (x.ndim - 1)) if values.numel() > 1 else values


def rebuild(model: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    """Apply a recipe's changes of the architecture to a copy of ``model``; without changes return the model itself.

    Args:
        model: left as it is.
        changes: "relu6": "replace" turns each ReLU6 into a ReLU; "biases": names of layers that get a bias.
    """
    if changes.get("relu6") != "replace" and not changes.get("biases"):
        return model
    network, _ = graph.trace(model)
    if changes.get("relu6") == "replace":
        _replace_relu6(network)
    for name in changes.get("biases", ()):
        layer: Any = network.get_submodule(name)
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
    return network


def _replace_relu6(network: fx.GraphModule) -> None:
    for node in network.graph.nodes:
        if graph.operation(node) is nn.ReLU6:
            network.set_submodule(str(node.target), nn.ReLU())
        elif graph.operation(node) is F.relu6:
            node.target = F.relu
    network.recompile()


def changes(network: nn.Module, model: nn.Module, relu6: Relu6) -> dict[str, Any]:
    """The changes with which ``rebuild`` turns the architecture of ``model`` into that of ``network``."""
    traced, _ = graph.trace(model)  # a layer that is called as a function may leave the bias of its module unused
    before = {name for name, module in traced.named_modules() if getattr(module, "bias", None) is not None}
    layers = nn.Conv2d | nn.Linear
    now = [name for name, module in network.named_modules() if isinstance(module, layers) and module.bias is not None]
    return {"relu6": relu6, "biases": [name for name in now if name not in before]}
