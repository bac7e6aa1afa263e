"""Trains strided 1×1 convolutions of many widths, each in every way that dfqlib does; test_convolution starts it.

    python tests/convolution_cases.py guarded      # through what dfqlib hands out
    python tests/convolution_cases.py unguarded    # as PyTorch computes them: dies, or is wrong, where the fault is

Prints a line before each case, so that a process that dies tells where. Exit code 1: a gradient is wrong.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import quantizer
from dfqlib.network import convolution
from dfqlib.training import channels_last

WIDTHS = (2, 3, 5, 6, 7, 12, 15, 16)
OUTPUTS = (12, 24)
BATCHES = (9, 64)
SIZES = ((16, 16), (15, 9))
TIMES = 3


class Subclass(nn.Conv2d):
    """A subclass that computes what its base does."""


class Functional(nn.Module):
    """A convolution that no layer does."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        with convolution.guarded():
            return F.conv2d(x, self.weight, self.bias, stride=2)


def ways(kind: str, layer: nn.Conv2d) -> dict[str, nn.Module]:
    """The networks that train ``layer``'s weights."""
    if kind == "unguarded":
        return {"plain": layer.to(memory_format=torch.channels_last)}  # type: ignore[call-overload]
    subclass = Subclass(layer.in_channels, layer.out_channels, 1, 2)
    subclass.load_state_dict(layer.state_dict())
    student = quantizer.quantize_layers(nn.Sequential(layer), quantizer.QuantSpec())  # in mode "float"
    return {
        "layer": channels_last(nn.Sequential(layer)),
        "subclass": channels_last(subclass),
        "functional": Functional(layer),
        "quantized": channels_last(student),
    }


def is_right(network: nn.Module, layer: nn.Conv2d, images: Tensor) -> bool:
    """Whether the weight's gradient is that of float64."""
    for _ in range(TIMES):
        network.zero_grad()
        network(images).square().sum().backward()
    (found,) = [each.grad for each in network.parameters() if each.ndim == 4]
    twin = nn.Conv2d(layer.in_channels, layer.out_channels, 1, 2).double()
    twin.load_state_dict(layer.state_dict())
    twin(images.double().contiguous()).square().sum().backward()
    assert found is not None
    assert twin.weight.grad is not None
    return float((found - twin.weight.grad).abs().max()) < 1e-4 * float(twin.weight.grad.abs().max())


def main(kind: str) -> int:
    """Try every case; returns the exit code."""
    torch.manual_seed(0)
    cases = 0
    for width, outputs, batch, size in itertools.product(WIDTHS, OUTPUTS, BATCHES, SIZES):
        images = torch.randn(batch, width, *size).contiguous(memory_format=torch.channels_last)
        layer = nn.Conv2d(width, outputs, 1, 2)
        for way, network in ways(kind, layer).items():
            print(f"{way}: {width} to {outputs} channels, {batch} images of {size}", flush=True)
            if not is_right(network, layer, images):
                print("wrong gradient", file=sys.stderr)
                return 1
            cases += 1
    print(f"{cases} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
