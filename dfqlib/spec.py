"""What a quantized network looks like: widths, granularity, scheme, and which tensors are stored in n bits."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dfqlib.errors import InputError

Granularity = Literal["tensor", "channel"]
Scheme = Literal["symmetric", "affine"]
Step = Literal["learned", "fixed"]
Skip = Literal["quantized", "float"]

INPUT_BITS = 8
"""Width of the network's input, whatever the rest is: images are stored in 8 bits anyway."""


@dataclass(frozen=True)
class QuantSpec:
    """What a quantized network looks like.

    Attributes:
        weight_bits: width of the weights, 2 to 16.
        activation_bits: width of every tensor that feeds a conv or a linear layer, 2 to 16.
        edge_bits: width of the first and the last layer, weights and inputs (DFQF: 8; set it to the other widths
            for "all layers n-bit", the protocol of GDFQ's tables). The network's input always has 8 bits.
        granularity: one step for a weight tensor, or one per output channel. Activations are always per tensor.
        scheme: "symmetric" (a step, zero maps to zero; DFQF Eq. 10) or "affine" (two bounds; GDFQ Eq. 6).
        step: "learned" trains steps (or bounds) with the weights; "fixed" keeps what calibration found; a fixed
            affine weight range follows the weights at each forward pass, as GDFQ's does.
        skip: "quantized" stores a tensor once for all its consumers, the skip connection included; "float" shows
            n bits to the layers only, as many later papers silently do.
        layers: widths of the weights of single layers by name, over all of the above (``sensitivity`` finds good
            ones); given as a mapping, kept as sorted pairs.

    Taught in notebook 07.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    edge_bits: int = 8
    granularity: Granularity = "tensor"
    scheme: Scheme = "symmetric"
    step: Step = "learned"
    skip: Skip = "quantized"
    layers: Mapping[str, int] | tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(sorted((str(name), bits) for name, bits in dict(self.layers).items())))
        for layer, bits in dict(self.layers).items():
            if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
                raise InputError(f'layers: "{layer}" has {bits!r} bits; give a whole number from 2 to 16')
        for name in ("weight_bits", "activation_bits", "edge_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
                raise InputError(f"{name}={bits!r} must be a whole number from 2 to 16")
        choices = {"granularity": Granularity, "scheme": Scheme, "step": Step, "skip": Skip}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                options = " or ".join(f'"{option}"' for option in get_args(allowed))
                raise InputError(f"{name}={getattr(self, name)!r} must be {options}")

    @classmethod
    def parse(cls, bits: "str | QuantSpec | Mapping[str, Any]", **changes: Any) -> "QuantSpec":
        """Read ``"w4a4"`` (any case) into a spec; a QuantSpec passes through. ``changes`` set the other fields.

        A mapping gives weight widths by layer name, and under "default" what holds for the rest ("w4a4"), such as
        ``{"default": "w4a4", "layer1.0.conv1": 8}``.

        Raises:
            InputError: the text is not of the form w<bits>a<bits>, or a field is out of range.
        """
        if isinstance(bits, QuantSpec):
            return dataclasses.replace(bits, **changes)
        if isinstance(bits, Mapping):
            layers = {name: width for name, width in bits.items() if name != "default"}
            return cls.parse(bits.get("default", "w4a4"), **{"layers": layers} | changes)
        match = re.fullmatch(r"w(\d+)a(\d+)", bits.strip().lower()) if isinstance(bits, str) else None
        if match is None:
            raise InputError(f'bits={bits!r} needs both widths, for example "w4a4"')
        return cls(weight_bits=int(match[1]), activation_bits=int(match[2]), **changes)

    @classmethod
    def dfqf(cls, weight_bits: int, activation_bits: int, **changes: Any) -> "QuantSpec":
        """The protocol of DFQF's tables: per tensor, first and last layer at 8 bits, learned step sizes."""
        fields: dict[str, Any] = {"edge_bits": 8, "granularity": "tensor"} | changes
        return cls(weight_bits, activation_bits, **fields)

    @classmethod
    def literature(cls, bits: int, **changes: Any) -> "QuantSpec":
        """The protocol of GDFQ's tables and most after it: all layers at this width, weights per output channel."""
        fields: dict[str, Any] = {"edge_bits": bits, "granularity": "channel"} | changes
        return cls(bits, bits, **fields)

    def __str__(self) -> str:
        ends = f"ends {self.edge_bits} bits"
        single = f", {len(dict(self.layers))} layers apart" if self.layers else ""
        kind = f"{self.scheme}, {self.step} steps, skip {self.skip}"
        return f"W{self.weight_bits}A{self.activation_bits} ({ends}, per {self.granularity}, {kind}{single})"

    def weight_bits_of(self, layer: str, at_edge: bool) -> int:
        """Width of the weights of a layer, the first and the last one being at the edge."""
        return dict(self.layers).get(layer, self.edge_bits if at_edge else self.weight_bits)


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code of ``bits`` bits: [-2^(n-1), 2^(n-1) - 1], or [0, 2^n - 1] unsigned."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
