"""The network as integers compute it: a graph of integer operations made from a fake-quantized one.

Fake quantization leaves sums, poolings and BatchNorm in floating point between two quantizers; an integer file cannot.
Here every tensor is codes on a grid: BatchNorm is folded into its layer, biases are whole numbers, what enters a sum
is stored in 8 bits. ``simulate`` returns a PyTorch network that computes what the exported file computes, code by
code, and shares its parameters with the network it came from, so that fine-tuning the one fine-tunes the other.

Taught in notebook 10.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfqlib.errors import InputError
from dfqlib.integer.lowering import PREFIX, Lowering, without_quantizers
from dfqlib.quantizer import AffineQuantizer, StepQuantizer, quantizers

__all__ = ["prepare", "prepare_from_noise", "simulate", "without_quantizers"]

MARGIN = 1.5
"""How far beyond noise's own range a grid reaches when there are no images: real activations have longer tails."""


def simulate(network: nn.Module) -> fx.GraphModule:
    """The integer network of a fake-quantized one, in eval mode: images in, logits out, codes in between.

    It shares weights, steps and BatchNorm with ``network``: train either and both have learned. It computes what the
    exported file computes, code by code. It differs from the fake-quantized network by the 8-bit grids of
    ``prepare``, by the bias grid, and in channels of negative BatchNorm gain, whose most negative weight code has no
    positive twin.

    Args:
        network: what ``quantize_layers`` made of a model: symmetric scheme, calibrated, and ``prepare``d.

    Raises:
        InputError: something has no integer form, or no range; names it and says what to do.

    Taught in notebook 10.
    """
    lowering = Lowering(_checked(network))
    simulation = lowering.lower()
    for name in lowering.stores:
        if lowering.grid(name).mode != "quantize":
            raise InputError(f"{name} has no range yet; call integer.prepare(network, images) first")
    return simulation


@torch.no_grad()
def prepare(network: nn.Module, images: Tensor) -> None:
    """Give ``network`` the grids that only integers need, as submodules ``store_*`` that fake quantization ignores.

    Args:
        network: what ``quantize_layers`` made of a model, calibrated; gets submodules. Grids it has stay as they are.
        images: what to take ranges from, normalized, (N, C, H, W).

    Raises:
        InputError: as ``simulate``.

    Taught in notebook 10.
    """
    checked = _checked(network)
    missing = _missing(checked)
    if missing:
        _Observer(checked, missing, 1.0).run(images)


@torch.no_grad()
def prepare_from_noise(network: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """``prepare`` where there are no images: from Gaussian noise that each BatchNorm layer normalizes by itself.

    What leaves a BatchNorm layer then has the mean and variance it had in training, whatever came in, and so the sums
    have about the ranges that images give them.
    """
    checked = _checked(network)
    missing = _missing(checked)
    if missing:
        runner = copy.deepcopy(checked)
        for module in runner.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        noise = torch.randn(64, *image_shape, generator=torch.Generator().manual_seed(0))
        _Observer(runner, missing, MARGIN).run(noise.to(next(checked.parameters()).device))


def _missing(network: fx.GraphModule) -> dict[str, StepQuantizer]:
    """Grids without a range, by the node they store."""
    lowering = Lowering(network)
    lowering.lower()
    grids = {name.removeprefix(PREFIX): lowering.grid(name) for name in lowering.stores}
    return {name: grid for name, grid in grids.items() if grid.mode != "quantize"}


class _Observer(fx.Interpreter):
    """Runs a network and sets the range of each grid from the node it is named after."""

    def __init__(self, network: fx.GraphModule, grids: dict[str, StepQuantizer], margin: float) -> None:
        super().__init__(network)
        self.extra_traceback = False  # it would add lines to the message of an error
        self.grids, self.margin = grids, margin

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        grid = self.grids.get(n.name)
        if grid is not None:
            grid.calibrate(value * self.margin)
            grid.mode = "quantize"
        return value


def _checked(network: nn.Module) -> fx.GraphModule:
    found = dict(quantizers(network))
    if not isinstance(network, fx.GraphModule) or not found:
        raise InputError(f"model={type(network).__name__} has no quantizers; give what dfqlib.quantize returned")
    for name, quantizer in found.items():
        if isinstance(quantizer, AffineQuantizer):
            raise InputError(
                f'{name} is affine, which has no integer form here; quantize with QuantSpec(scheme="symmetric")'
            )
        if quantizer.mode != "quantize" and not name.startswith(PREFIX):
            raise InputError(f"{name} is not calibrated; call quantizer.calibrate(network, images) first")
        if quantizer.bits > 8:
            raise InputError(f"{name} has {quantizer.bits} bits, but integer files carry at most 8; quantize to 8 bits")
    for name, value in network.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise InputError(f"{name} is {value.dtype}, not float32; quantize and export model.float()")
    return network
