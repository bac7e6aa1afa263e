"""Mixed precision: the sensitivity of each layer to its bit width, and the best bit widths for a budget.

Taught in notebook 11.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfqlib.errors import InputError
from dfqlib.losses import distillation_loss
from dfqlib.network.inference import Batches, as_images, predict
from dfqlib.quantizer import QuantSpec, StepQuantizer, quantize_layers


@dataclass(frozen=True)
class Sensitivity:
    """Result of ``sensitivity``.

    Attributes:
        weights: number of weights of each layer, in the order of the network.
        widths: the bit widths, ascending.
        losses: by layer and bit width, KL divergence of the teacher's outputs in nats per image when only the weights
            of that layer are quantized.
    """

    weights: dict[str, int]
    widths: tuple[int, ...]
    losses: dict[str, dict[int, float]]

    def ranking(self) -> list[str]:
        """Layers by sensitivity at the smallest bit width, the most sensitive first."""
        return sorted(self.losses, key=lambda name: -self.losses[name][self.widths[0]])

    def pareto(self) -> list[tuple[float, float, dict[str, int]]]:
        """(bytes of weights, sum of the losses, bit widths by layer), ascending, from the smallest bit widths on.

        Each entry raises the bit width of the layer whose loss falls most per byte.
        """
        bits = dict.fromkeys(self.losses, self.widths[0])
        points = [self._point(bits)]
        while any(width < self.widths[-1] for width in bits.values()):
            gains = {}
            for name, width in bits.items():
                for wider in self.widths[self.widths.index(width) + 1 :]:
                    gain = self.losses[name][width] - self.losses[name][wider]
                    gains[gain / (self.weights[name] * (wider - width))] = (name, wider)
            name, wider = gains[max(gains)]
            bits = bits | {name: wider}
            points.append(self._point(bits))
        return points

    def bits_for(self, budget: float) -> dict[str, int]:
        """Bit widths by layer for at most ``budget`` bytes of weights, as ``bits=`` of ``quantize`` takes them.

        Raises:
            InputError: the smallest bit widths need more.
        """
        fitting = [(loss, bits) for size, loss, bits in self.pareto() if size <= budget]
        if not fitting:
            smallest = self.pareto()[0][0]
            raise InputError(f"budget={budget:.0f} bytes is below {smallest:.0f}, what {self.widths[0]} bits need")
        return min(fitting, key=lambda found: found[0])[1]

    def plot(self, axes: Any) -> None:
        """Draw loss against bytes: a line for mixed bit widths, a point for each single one."""
        sizes, losses, _ = zip(*self.pareto(), strict=True)
        axes.plot([size / 1e3 for size in sizes], losses, label="mixed widths")
        for width in self.widths:
            size, loss, _ = self._point(dict.fromkeys(self.losses, width))
            axes.plot(size / 1e3, loss, "o", color="black")
            axes.annotate(f"{width} bits", (size / 1e3, loss), textcoords="offset points", xytext=(5, 5))
        axes.set(xlabel="weights (kB)", ylabel="loss (nats)", yscale="log", title="Where bytes help")
        axes.legend()

    def _point(self, bits: dict[str, int]) -> tuple[float, float, dict[str, int]]:
        size = sum(self.weights[name] * width / 8 for name, width in bits.items())
        return size, sum(self.losses[name][width] for name, width in bits.items()), bits


@torch.no_grad()
def sensitivity(
    model: nn.Module, images: Tensor | Batches, widths: Sequence[int] = (2, 3, 4, 6, 8), granularity: Any = "channel"
) -> Sensitivity:
    """Quantize the weights of one layer at a time and measure the change of the network's outputs.

    Args:
        model: the trained network in floating point; not modified.
        images: (N, C, H, W), normalized, or a loader; synthetic images suffice.
        widths: bit widths, 2 to 16.
        granularity: "tensor" or "channel".

    Raises:
        InputError: a bit width out of range, no images, or a model without layers to quantize.

    Taught in notebook 11.
    """
    images = as_images(images)
    if not widths or len(images) == 0:
        raise InputError(f"widths={tuple(widths)} and images ({len(images)}) must each have at least one element")
    ordered = tuple(sorted(set(widths)))
    expected = predict(model, images)
    losses: dict[str, dict[int, float]] = {}
    weights: dict[str, int] = {}
    for width in ordered:
        spec = QuantSpec(width, 8, edge_bits=width, granularity=granularity, step="fixed")
        network = quantize_layers(model, spec)
        for name, layer in network.named_modules():
            quantizer = getattr(layer, "weight_quantizer", None)
            if not isinstance(quantizer, StepQuantizer) or not isinstance(layer.weight, Tensor):
                continue
            quantizer.calibrate(layer.weight)
            quantizer.mode = "quantize"
            loss = distillation_loss(predict(network, images), expected, 1.0)
            quantizer.mode = "float"
            losses.setdefault(name, {})[width] = max(float(loss), 0.0)
            weights[name] = layer.weight.numel()
    return Sensitivity(weights, ordered, losses)
