"""The network as integers compute it: a graph of integer operations made from a fake-quantized one.

Fake quantization leaves sums, poolings and BatchNorm in floating point between two quantizers; an integer file cannot.
Here every tensor is codes on a grid: BatchNorm is folded into its layer, biases are whole numbers, what enters a sum
is stored in 8 bits. ``simulate`` returns a PyTorch network that computes what the exported file computes, code by
code, and shares its parameters with the network it came from, so that fine-tuning the one fine-tunes the other.

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
"""How far beyond noise's own range a grid reaches when there are no images: real activations have longer tails."""


def simulate(network: nn.Module) -> fx.GraphModule:
    """The integer network of a fake-quantized one, in eval mode: images in, logits out, codes in between.

    It shares weights, steps and BatchNorm with ``network``: train either and both have learned. It computes what the
    exported file computes, code by code. It differs from the prepared network by the bias grid, in channels of negative
    BatchNorm gain, whose most negative weight code has no positive twin, and in channels of 8-bit weights that are
    stored in 7 bits (``narrowed``).

    Args:
        network: what ``quantize_layers`` made of a model: symmetric scheme, calibrated, and after ``prepare``.

    Raises:
        InputError: something has no integer form, or no range; names it and says what to do.
        NonFiniteError: a weight, a step or a statistic is NaN or infinite; names it.

    Taught in notebook 10.
    """
    lowering = Lowering(_checked(network))
    simulation = lowering.lower()
    for name, grid in lowering.added.items():
        if grid.mode != "quantize":
            raise InputError(f"{name} has no range yet; call integer.prepare(network, images) first")
    return simulation


@torch.no_grad()
def prepare(network: nn.Module, images: Tensor) -> None:
    """Quantize what only integers need quantized: give each tensor that has no grid yet one of 8 bits, in place.

    The network then *is* what the integer file computes, up to the rounding of biases and of weights that are stored in
    7 bits (``narrowed``): its accuracy is the file's, and fine-tuning it goes on under the conditions of the file. The
    new quantizers are submodules ``store_*``. ``settle`` rounds the rest, too.

    Args:
        network: what ``quantize_layers`` made of a model, calibrated. Grids it has stay as they are.
        images: what to take ranges from, normalized, (N, C, H, W).

    Raises:
        InputError: as ``simulate``.

    Taught in notebook 10.
    """
    grids = attach(network)
    for grid in grids:
        grid.mode = "calibrate"
    if grids:
        network(images)
    for grid in grids:
        grid.mode = "quantize"


def settle(network: nn.Module) -> None:
    """Write into a prepared network what its integers will round, in place: its accuracy is then the file's.

    That is the grid of each bias, in channels of negative BatchNorm gain the most negative weight code, which has no
    positive twin, and the weights of 7 bits (``narrowed``), which are even codes of 8 bits. ``simulate`` rounds them
    anyway, and goes on doing so when the network is trained further.

    Args:
        network: as for ``simulate``.

    Taught in notebook 10.
    """
    for module in simulate(network).modules():
        if isinstance(module, IntegerLayer):
            module.settle()


def narrowed(network: nn.Module) -> dict[str, int]:
    """How many channels of each layer an exported file stores in 7 bits instead of 8; layers without any are left out.

    On x86 processors without VNNI instructions the fast kernels add the products of two inputs and weights in 16 bits,
    and cut what goes beyond. Channels of 8-bit weights in which two products could do so get a grid of 7 bits, twice
    as coarse, and then the file computes the same everywhere.

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
    for name, grid in quantizers(network):
        if isinstance(grid, StepQuantizer) and f"{name}.step" in steps:
            grid.step.copy_(steps[f"{name}.step"])
            grid.set_sign(signed.get(name, grid.signed))
            grid.mode = "quantize"


@torch.no_grad()
def prepare_from_noise(network: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """``prepare`` where there are no images: from Gaussian noise that each BatchNorm layer normalizes by itself.

    What leaves a BatchNorm layer then has the mean and variance it had in training, whatever came in, and so the sums
    have about the ranges that images give them.
    """
    attach(network)
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    noise = torch.randn(64, *image_shape, generator=torch.Generator().manual_seed(0))
    prepare(twin, noise.to(next(network.parameters()).device))
    for (_, grid), (_, ranged) in zip(quantizers(network), quantizers(twin), strict=True):
        if isinstance(grid, StepQuantizer) and isinstance(ranged, StepQuantizer) and grid.mode == "float":
            grid.step.copy_(ranged.step * MARGIN)
            grid.set_sign(ranged.signed)
            grid.mode = "quantize"


def attach(network: nn.Module) -> list[StepQuantizer]:
    """Insert the quantizers of ``prepare`` without ranges; they hand values through until they have some.

    Returns:
        Those without a range.
    """
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
    return [grid for grid in lowering.added.values() if grid.mode != "quantize"]


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
