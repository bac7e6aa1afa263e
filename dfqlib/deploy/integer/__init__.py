"""Simulate integer arithmetic: a graph of integer operations made from a fake-quantized network.

Fake quantization leaves sums, pooling and BatchNorm in floating point between two quantizers. Here every tensor has
integer values and a scale: BatchNorm is folded into its layer, biases are integers, terms of sums have 8 bits.
``simulate`` returns a PyTorch network that computes exactly what the exported file computes.

Taught in notebook 10.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfqlib.deploy.integer.layer import IntegerLayer
from dfqlib.deploy.integer.lowering import PREFIX, Lowering, prefix_in
from dfqlib.errors import InputError, NonFiniteError
from dfqlib.quantizer import AffineQuantizer, StepQuantizer, quantizers

__all__ = ["PREFIX", "attach", "narrowed", "prepare", "prepare_from_noise", "prepare_from_saved", "settle", "simulate"]

MARGIN = 1.5
"""Ranges found on noise are widened by this factor: real activations have longer tails."""


def simulate(network: nn.Module) -> fx.GraphModule:
    """The integer network of a fake-quantized one, in eval mode: images in, logits out, integers in between.

    It shares weights, step sizes and BatchNorm with ``network``: train either and both have learned. It computes what
    the exported file computes, and differs from the prepared network by what ``settle`` rounds.

    Args:
        network: from ``quantize_layers``, symmetric scheme, calibrated, and after ``prepare``.

    Raises:
        InputError: something has no integer form, or no range; names it and says what to do.
        NonFiniteError: a weight, a step size or a statistic is NaN or infinite; names it.

    Taught in notebook 10.
    """
    lowering = Lowering(_checked(network))
    simulation = lowering.lower()
    for name, quantizer in lowering.added.items():
        if quantizer.mode != "quantize":
            raise InputError(f"{name} has no range yet; call integer.prepare(network, images) first")
    return simulation


@torch.no_grad()
def prepare(network: nn.Module, images: Tensor) -> None:
    """Give each tensor that only an integer file quantizes a quantizer of 8 bits, ``store_*``, in place.

    The network then computes what the integer file computes, up to what ``settle`` rounds: its accuracy is the file's,
    and fine-tuning continues under the file's conditions.

    Args:
        network: from ``quantize_layers``, calibrated. Quantizers that it has stay as they are.
        images: (N, C, H, W), normalized, for the ranges.

    Raises:
        InputError: as ``simulate``.

    Taught in notebook 10.
    """
    added = attach(network)
    for quantizer in added:
        quantizer.mode = "calibrate"
    if added:
        network(images)
    for quantizer in added:
        quantizer.mode = "quantize"


def settle(network: nn.Module) -> None:
    """Round in a prepared network what its integers round, in place: its accuracy is then exactly the file's.

    These are biases, the most negative weight in channels of negative BatchNorm gain (its negative is out of range),
    and weights stored in 7 bits (``narrowed``). ``simulate`` rounds them anyway, also when training continues.

    Args:
        network: as for ``simulate``.

    Taught in notebook 10.
    """
    for module in simulate(network).modules():
        if isinstance(module, IntegerLayer):
            module.settle()


def narrowed(network: nn.Module) -> dict[str, int]:
    """The number of channels that an exported file stores in 7 bits instead of 8, by layer; zeros are left out.

    On x86 processors without VNNI instructions the fast kernels add two products of inputs and weights in 16 bits and
    saturate. Channels of 8-bit weights in which two products could exceed 16 bits get twice the step size.

    Args:
        network: as for ``simulate``, before or after ``prepare``.

    Taught in notebook 10.
    """
    layers = Lowering(_checked(network)).lower().modules()
    counts = {layer.name: int(layer.narrowed.sum()) for layer in layers if isinstance(layer, IntegerLayer)}
    return {name: count for name, count in counts.items() if count}


@torch.no_grad()
def prepare_from_saved(network: nn.Module, steps: Mapping[str, Tensor], signed: Mapping[str, bool]) -> None:
    """``prepare`` with the step sizes and signs that were found before, by their names in a prepared network."""
    attach(network)
    for name, quantizer in quantizers(network):
        if isinstance(quantizer, StepQuantizer) and f"{name}.step" in steps:
            quantizer.step.copy_(steps[f"{name}.step"])
            quantizer.set_sign(signed.get(name, quantizer.signed))
            quantizer.mode = "quantize"


@torch.no_grad()
def prepare_from_noise(network: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """``prepare`` without images: from Gaussian noise, which each BatchNorm layer normalizes by its own statistics.

    Its outputs then have the mean and variance of training, and sums about the ranges that images give them.
    """
    attach(network)
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    noise = torch.randn(64, *image_shape, generator=torch.Generator().manual_seed(0))
    prepare(twin, noise.to(next(network.parameters()).device))
    for (_, quantizer), (_, ranged) in zip(quantizers(network), quantizers(twin), strict=True):
        if isinstance(quantizer, StepQuantizer) and isinstance(ranged, StepQuantizer) and quantizer.mode == "float":
            quantizer.step.copy_(ranged.step * MARGIN)
            quantizer.set_sign(ranged.signed)
            quantizer.mode = "quantize"


def attach(network: nn.Module) -> list[StepQuantizer]:
    """Insert the quantizers of ``prepare``; returns those without a range, which pass values through unchanged."""
    checked = _checked(network)
    lowering = Lowering(checked)
    lowering.lower()
    there = {str(node.target) for node in checked.graph.nodes if node.op == "call_module"}
    for node in list(checked.graph.nodes):
        name = f"{lowering.prefix}{node.name}"
        if name in lowering.added and name not in there:
            checked.add_submodule(name, lowering.added[name])
            with checked.graph.inserting_after(node):
                stored = checked.graph.call_module(name, (node,))
            node.replace_all_uses_with(stored, delete_user_cb=lambda user, stored=stored: user is not stored)
    checked.recompile()
    return [quantizer for quantizer in lowering.added.values() if quantizer.mode != "quantize"]


def _checked(network: nn.Module) -> fx.GraphModule:
    found, prefix = dict(quantizers(network)), prefix_in(network)
    if not isinstance(network, fx.GraphModule) or not found:
        raise InputError(f"model={type(network).__name__} has no quantizers; give what dfqlib.quantize returned")
    for name, quantizer in found.items():
        if isinstance(quantizer, AffineQuantizer):
            raise InputError(
                f'{name} is affine, which has no integer form here; quantize with QuantSpec(scheme="symmetric")'
            )
        if quantizer.mode != "quantize" and not name.startswith(prefix):
            raise InputError(f"{name} is not calibrated; call quantizer.calibrate(network, images) first")
        if quantizer.bits > 8:
            raise InputError(f"{name} has {quantizer.bits} bits, but integer files carry at most 8; quantize to 8 bits")
    for name, value in network.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise InputError(f"{name} is {value.dtype}, not float32; quantize and export model.float()")
        if not bool(value.isfinite().all()):
            raise NonFiniteError(f"{name} holds NaN or infinite values; quantize a sound checkpoint")
    return network
