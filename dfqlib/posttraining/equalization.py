"""Cross-layer equalization and high-bias absorption: easier weights to quantize for the same function.

Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), sections 4.1 and 4.2.
Because ``relu(s x) = s relu(x)`` for s > 0, a channel can be divided by s in one layer and multiplied by s in the next.
Equalization chooses the factors that give all channels of both layers the same range.

BatchNorm is folded first (``network.folding``): the weights take its scale, the layer stays and adds the bias.

Taught in notebook 02.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.network import graph, kinds
from dfqlib.network.folding import Folded, Layer

ACTIVATIONS = kinds.RELU | {nn.LeakyReLU, F.leaky_relu}
"""Positively homogeneous activations; ReLU6 is not, because of its fixed upper bound."""
POOLS = kinds.MAX_POOLS | kinds.ADAPTIVE_MAX_POOLS | {nn.AvgPool2d, F.avg_pool2d} | kinds.ADAPTIVE
FLATTENS = kinds.FLATTENS | kinds.MEANS
SIZES = kinds.SIZES | {getattr}
DEAD = 1e-5
"""Share of a layer's largest range below which a channel counts as dead."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers with nothing but positively homogeneous operations between them.

    Attributes:
        first: the layer that computes the channels.
        second: the only layer that reads them.
        padded: zeros pad the channels in between, so that a constant added to them changes the border.
    """

    first: Layer
    second: Layer
    padded: bool


def find_pairs(folded: Folded) -> list[Pair]:
    """The pairs of layers that can be equalized, in the order of the graph."""
    by_node = {layer.node: layer for layer in folded.layers.values()}
    return [pair for layer in folded.layers.values() if (pair := _reader(layer, by_node)) is not None]


def output_ranges(layer: Layer) -> Tensor:
    """Largest magnitude of the weights of each output channel, (channels,)."""
    return layer.module.weight.detach().abs().flatten(1).amax(1)


def input_ranges(layer: Layer, channels: int) -> Tensor:
    """Largest magnitude of the weights that read each of ``channels`` input channels, (channels,)."""
    return layer.by_input(layer.module.weight.detach(), channels).abs().amax((1, 3)).flatten()


def _reader(first: Layer, by_node: Mapping[fx.Node, Layer]) -> Pair | None:
    """Follow the only consumer of each tensor from ``first`` to the next layer."""
    node, flattened, padded = first.output, False, False
    while True:
        readers = [user for user in node.users if graph.operation(user) not in SIZES]
        if len(readers) != 1:
            return None
        last, node = node, readers[0]
        kind = graph.operation(node)
        if node in by_node:
            return _pair(first, by_node[node], flattened, padded)
        if kind in FLATTENS and node.args[0] is last and _keeps_channels(node):
            flattened = True
        elif kind in POOLS:
            padded |= _pads(node)
        elif kind not in ACTIVATIONS | kinds.NOTHING:
            return None


def _keeps_channels(node: fx.Node) -> bool:
    """Whether a reshape or mean maps (batch, channels, height, width) to (batch, channels * positions)."""
    kind, given = graph.operation(node), node.args[1:]
    if kind is nn.Flatten:
        module: Any = graph.module_of(node)
        return (module.start_dim, module.end_dim) == (1, -1)
    if kind in kinds.MEANS:
        dims = given[0] if given else node.kwargs.get("dim")
        return isinstance(dims, tuple | list) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]
    if kind in ("view", "reshape"):
        return len(given) == 2 and not isinstance(given[0], tuple)
    start = given[0] if given else node.kwargs.get("start_dim", 0)
    return bool(start == 1) and len(given) < 2 and "end_dim" not in node.kwargs


def _pads(node: fx.Node) -> bool:
    """Whether a pooling averages over padding; padding does not change a maximum."""
    kind = graph.operation(node)
    if kind is nn.AvgPool2d:
        pool: Any = graph.module_of(node)
        return pool.padding not in (0, (0, 0))
    return kind is F.avg_pool2d and ("padding" in node.kwargs or len(node.args) > 3)


def _pair(first: Layer, second: Layer, flattened: bool, padded: bool) -> Pair | None:
    module = second.module
    if isinstance(module, nn.Conv2d):
        fits = module.in_channels == first.channels and isinstance(first.module, nn.Conv2d) and not flattened
        padded |= module.padding not in (0, (0, 0), "valid") and module.padding_mode == "zeros"
    else:
        from_conv = isinstance(first.module, nn.Conv2d)
        fits = from_conv == flattened and module.in_features % first.channels == 0
        fits &= from_conv or module.in_features == first.channels
    return Pair(first, second, padded) if fits else None


def pair_scales(first: Tensor, second: Tensor) -> Tensor:
    """``s = sqrt(r1 r2) / r2`` (Eq. 11): outputs divided by s and inputs multiplied by s both have range sqrt(r1 r2).

    Args:
        first: ranges of the first layer's output channels, (channels,).
        second: ranges of the second layer's input channels, (channels,).

    Returns:
        (channels,), 1 for a dead channel, whose bias would grow as much as its weights.
    """
    return torch.where(_alive(first, second), (first * second).sqrt() / second, 1.0)


def triple_scales(first: Tensor, depthwise: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Scales before and after a depthwise layer that give all three layers the range ``(r1 r2 r3)^(1/3)``."""
    alive, root = _alive(first, depthwise, last), (first * depthwise * last) ** (1 / 3)
    return torch.where(alive, first / root, 1.0), torch.where(alive, root / last, 1.0)


def _alive(*ranges: Tensor) -> Tensor:
    return torch.stack([r > DEAD * r.max() for r in ranges]).all(0)


@torch.no_grad()
def equalize(folded: Folded, iterations: int = 20, tolerance: float = 1e-3) -> int:
    """Equalize the channel ranges of connected layers, in place; the FP32 output is unchanged up to rounding.

    Passes over all pairs are repeated until the scales converge (section 4.1). A depthwise layer, whose input and
    output channels are the same, is equalized together with the layers before and after it.

    Args:
        folded: from ``fold``.
        iterations: largest number of passes.
        tolerance: relative change of the scales at which to stop.

    Returns:
        Number of passes.

    Taught in notebook 02.
    """
    steps = list(_steps(find_pairs(folded)))
    for index in range(iterations):
        moved = 0.0
        for before, after in steps:
            ranges = output_ranges(before.first), input_ranges(before.second, before.first.channels)
            if after is None:
                scales = [pair_scales(*ranges)]
            else:
                scales = list(triple_scales(*ranges, input_ranges(after.second, after.first.channels)))
            for pair, scale in zip((before, after), scales, strict=False):
                assert pair is not None
                _scale(folded, pair, scale)
                moved = max(moved, float(scale.log().abs().max()))
        if moved < tolerance:
            return index + 1
    return iterations


def _steps(pairs: list[Pair]) -> Iterator[tuple[Pair, Pair | None]]:
    """Pairs of layers; the two pairs of a depthwise layer together."""
    after = {pair.first.node: pair for pair in pairs}
    taken = set()
    for pair in pairs:
        following = after.get(pair.second.node)
        if following is not None and _is_depthwise(pair.second):
            taken.add(following.first.node)
            yield pair, following
        elif pair.first.node not in taken:
            yield pair, None


def _is_depthwise(layer: Layer) -> bool:
    return layer.groups > 1 and layer.channels == layer.groups == int(layer.module.in_channels)


def _scale(folded: Folded, pair: Pair, scale: Tensor) -> None:
    """Divide the outputs of the first layer by ``scale`` and multiply the weights of the second by it."""
    pair.first.scale_outputs(1 / scale)
    pair.second.scale_inputs(scale)
    name = str(pair.first.output.target)
    if name in folded.statistics:
        mean, std = folded.statistics[name]
        folded.statistics[name] = mean / scale, std / scale


@torch.no_grad()
def absorb(folded: Folded, padded: bool = False, deviations: float = 3.0) -> dict[str, Tensor]:
    """Absorb high biases into the next layer, in place (section 4.1.3).

    With ``c = max(0, beta - 3 gamma)`` nearly every value of a channel exceeds c, so that
    ``relu(x - c) = relu(x) - c``: subtracting c from the first layer's bias and adding ``W c`` to the second's reduces
    the range of the activation. The output changes for the 0.1 % of values below c.

    Args:
        folded: from ``fold``, equalized or not.
        padded: also where the second layer pads with zeros; the border of its output then changes, which the paper
            does not discuss.
        deviations: the 3 of the equation.

    Returns:
        c, (channels,), by the first layer's name where it is not 0.

    Taught in notebook 02.
    """
    absorbed = {}
    for pair in find_pairs(folded):
        name = str(pair.first.output.target)
        if name not in folded.statistics or (pair.padded and not padded):
            continue
        mean, std = folded.statistics[name]
        constant = high_bias(mean, std, deviations)
        if bool((constant > 0).any()):
            pair.first.shift(-constant)
            pair.second.shift(pair.second.response(pair.second.module.weight, constant))
            folded.statistics[name] = mean - constant, std
            absorbed[pair.first.name] = constant
    return absorbed


def high_bias(mean: Tensor, std: Tensor, deviations: float = 3.0) -> Tensor:
    """``c = max(0, beta - 3 gamma)``, shaped like ``mean``."""
    return (mean - deviations * std).clamp(min=0)
