"""Count the multiply-accumulates that are quantized, and those that are not.

Taught in notebook 11.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

LOUD = 1.0
"""Percent of the multiply-accumulates in floating point above which there is a warning."""


@dataclass(frozen=True)
class Coverage:
    """Multiply-accumulates of one image.

    Attributes:
        total: of the network.
        floating: those in floating point by module, the largest share first.
    """

    total: int
    floating: dict[str, int]

    @property
    def floating_share(self) -> float:
        """Share in floating point, in percent."""
        return 100 * sum(self.floating.values()) / max(self.total, 1)

    def __str__(self) -> str:
        text = f"{100 - self.floating_share:.1f} % of {self.total:,} multiply-accumulates are quantized"
        if not self.floating:
            return text
        shares = [f"{name} ({100 * macs / self.total:.1f} %)" for name, macs in self.floating.items()]
        more = f" and {len(shares) - 5} more" if len(shares) > 5 else ""
        return f"{text}; in floating point: {', '.join(shares[:5])}{more}"


@torch.no_grad()
def coverage(network: nn.Module, image_shape: tuple[int, int, int]) -> Coverage:
    """Count the multiply-accumulates of a fake-quantized network: in layers, functions and attention.

    Args:
        network: what ``quantize_layers`` made; runs once on an image of zeros.
        image_shape: (channels, height, width).

    Taught in notebook 11.
    """
    place = next(network.parameters(), torch.empty(0)).device
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one kernel for a whole block is not counted
    try:
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *image_shape, device=place))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    counted = {name: sum(kinds.values()) // 2 for name, kinds in counter.get_flop_counts().items()}
    total = counted.pop("Global", 0)
    root = type(network).__name__
    inside = {name.removeprefix(f"{root}."): macs for name, macs in counted.items() if name.startswith(f"{root}.")}
    quantized = {name for name, module in network.named_modules() if hasattr(module, "weight_quantizer")}
    floating = _own(inside, quantized)
    floating["functions"] = total - sum(floating.values()) - sum(inside.get(name, 0) for name in quantized)
    by_share = sorted(floating.items(), key=lambda item: -item[1])
    return Coverage(total, {name: macs for name, macs in by_share if macs > 0})


def _own(counted: dict[str, int], quantized: set[str]) -> dict[str, int]:
    """Multiply-accumulates of each module that is not quantized, without those of its submodules."""
    own = {}
    for name, macs in counted.items():
        if name not in quantized:
            parts = [part for part in counted if part.rpartition(".")[0] == name]
            own[name] = macs - sum(counted[part] for part in parts)
    return own
