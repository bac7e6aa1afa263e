"""Bias correction, and biases of 16 or 32 bits.

Rounding weights shifts what a layer puts out by ``epsilon x`` with ``epsilon = W_quantized - W``. Its mean over the
data, ``epsilon E[x]``, is a constant per channel, and a bias takes it away again (Nagel et al., ICCV 2019, sec. 4.2).
E[x] comes from BatchNorm statistics, or from images.

Taught in notebook 02.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from dfqlib.errors import InputError
from dfqlib.network import graph, kinds
from dfqlib.network.folding import find_layers
from dfqlib.posttraining.moments import Statistics, propagate
from dfqlib.quantizer import AffineQuantizer, Quantizer, StepQuantizer, fake_quantize, integer_range


def expected_inputs(network: fx.GraphModule, statistics: Statistics) -> dict[str, Tensor]:
    """E[x] of each input channel, by layer, from the statistics of BatchNorm layers: no data needed.

    The mean of a normal variable after its ReLU or ReLU6 (Nagel et al. 2019, appendix C). Layers whose input no
    statistics tell about (the network's own, after max pooling, after a layer without BatchNorm) are absent.

    Taught in notebook 02.
    """
    known, layers = propagate(network, statistics), find_layers(network)
    sources = {name: layer.node.all_input_nodes[0] for name, layer in layers.items()}
    return {name: known[source].expectation() for name, source in sources.items() if source in known}


@torch.no_grad()
def measured_inputs(network: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """The mean of each input channel, by layer, over ``images`` (N, C, H, W).

    Taught in notebook 02.
    """
    means: dict[str, Tensor] = {}
    handles = []
    for name, layer in find_layers(network).items():

        def note(_: object, args: tuple[Tensor, ...], name: str = name) -> None:
            means[name] = args[0].mean((0, 2, 3) if args[0].ndim == 4 else tuple(range(args[0].ndim - 1)))

        handles.append(layer.module.register_forward_pre_hook(note))
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return means


@torch.no_grad()
def correct_biases(student: fx.GraphModule, teacher: fx.GraphModule, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Subtract ``epsilon E[x]`` from the bias of each layer in ``inputs``, in place (section 4.2.1).

    Args:
        student: the calibrated network; a layer without bias and BatchNorm gets a bias.
        teacher: the network that was quantized, its layers called the same.
        inputs: E[x] by layer, from ``expected_inputs`` or ``measured_inputs``.

    Returns:
        What was subtracted, (channels,), by layer.

    Taught in notebook 02.
    """
    corrections = {}
    for name, layer in find_layers(student).items():
        if name not in inputs:
            continue
        original = teacher.get_submodule(name).weight
        error = layer.module.weight_quantizer(layer.module.weight) - original
        corrections[name] = layer.response(error, inputs[name])
        layer.shift(-corrections[name])
    return corrections


def round_bias(bias: Tensor, step: Tensor | float, bits: int) -> Tensor:
    """``bias`` on the grid of an accumulator, cut to codes of ``bits`` bits.

    The grid is ``step * 2^k`` with the smallest k = 0, 1, ... for which every code fits: hardware adds a code of few
    bits to a wide accumulator by shifting it k to the left.

    Args:
        bias: (channels,).
        step: step of the weights times step of the input; a scalar, or (channels,).
        bits: 2 to 32.

    Raises:
        InputError: ``bits`` out of range.

    Taught in notebook 02.
    """
    if not 2 <= bits <= 32:
        raise InputError(f"bits={bits} must be from 2 to 32")
    low, high = integer_range(bits, signed=True)
    wide = torch.as_tensor(step, dtype=torch.float64, device=bias.device).expand_as(bias)
    largest = float((bias.double() / wide).abs().max())
    shift = max(0, math.ceil(math.log2(largest / high))) if largest > high else 0
    return fake_quantize(bias.double(), wide * 2.0**shift, low, high).to(bias)


@torch.no_grad()
def round_biases(student: fx.GraphModule, bits: int) -> list[str]:
    """Store the biases of a folded, calibrated network in ``bits`` bits, in place; see ``round_bias``.

    Returns:
        The layers it was done for: called once, with weights and input quantized.

    Taught in notebook 02.
    """
    rounded = []
    for name, layer in find_layers(student).items():
        source = layer.node.all_input_nodes[0]
        while graph.operation(source) in kinds.VIEWS:
            source = source.all_input_nodes[0]
        if graph.operation(source) not in (StepQuantizer, AffineQuantizer):
            continue
        step = _step(graph.module_of(source)) * _step(layer.module.weight_quantizer)  # type: ignore[arg-type]
        bias = layer.bias()
        layer.shift(round_bias(bias, step, bits) - bias)
        rounded.append(name)
    return rounded


def _step(quantizer: Quantizer) -> Tensor:
    if isinstance(quantizer, StepQuantizer):
        return quantizer.step.detach()
    return (quantizer.high - quantizer.low).detach() / (2**quantizer.bits - 1)
