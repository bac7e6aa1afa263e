"""Bias correction (Nagel et al., ICCV 2019, section 4.2), and quantization of biases.

Quantizing the weights changes a layer's output by ``epsilon x`` with ``epsilon = W_quantized - W``. The mean of this
error, ``epsilon E[x]``, is a constant per channel, which the bias can compensate. E[x] comes from BatchNorm statistics
or from images.

Taught in notebook 02.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from dfqlib.errors import InputError
from dfqlib.evaluation.metrics import recording
from dfqlib.network import graph, kinds
from dfqlib.network.folding import find_layers
from dfqlib.posttraining.moments import Statistics, propagate
from dfqlib.quantizer import AffineQuantizer, Quantizer, StepQuantizer, fake_quantize, integer_range


def expected_inputs(network: fx.GraphModule, statistics: Statistics) -> dict[str, Tensor]:
    """E[x] of each input channel, by layer, from BatchNorm statistics (Nagel et al. 2019, appendix C).

    Layers whose input has no known distribution (the first one, after max pooling, after a layer without BatchNorm)
    are absent.

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

    def record(name: str, x: Tensor, _: Tensor) -> None:
        means[name] = x.mean((0, 2, 3) if x.ndim == 4 else tuple(range(x.ndim - 1)))

    with recording({name: layer.module for name, layer in find_layers(network).items()}, record):
        network(images)
    return means


@torch.no_grad()
def correct_biases(student: fx.GraphModule, teacher: fx.GraphModule, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Subtract ``epsilon E[x]`` from the bias of each layer in ``inputs``, in place (section 4.2.1).

    Args:
        student: the calibrated network; a layer without bias and BatchNorm gets a bias.
        teacher: the network before quantization, with the same names of layers.
        inputs: E[x] by layer, from ``expected_inputs`` or ``measured_inputs``.

    Returns:
        The subtracted values, (channels,), by layer.

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
    """``bias`` rounded to integer values of ``bits`` bits with the step size ``step * 2^k``.

    k = 0, 1, ... is the smallest for which every value fits: hardware shifts a value of few bits by k to the left and
    adds it to a wide accumulator.

    Args:
        bias: (channels,).
        step: step size of the weights times that of the input; a scalar, or (channels,).
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
    """Round the biases of a folded, calibrated network to ``bits`` bits, in place; see ``round_bias``.

    Returns:
        The names of the layers: those called once whose weights and input are quantized.

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
