"""Specification of a quantized network: bit widths, granularity, scheme, step sizes and skip connections."""

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
"""Bit width of the network's input in every specification: images are stored in 8 bits anyway."""


@dataclass(frozen=True)
class QuantSpec:
    """How a network is quantized.

    Attributes:
        weight_bits: bit width of the weights, 2 to 16.
        activation_bits: bit width of every tensor that feeds a convolution or a linear layer, 2 to 16.
        edge_bits: bit width of the first and the last layer, weights and inputs: 8 in DFQF's tables, the same as the
            other layers in GDFQ's (see ``literature``). The network's input always has 8 bits.
        granularity: "tensor" for one step size per weight tensor (the default, as in DFQF), "channel" for one per
            output channel. Activations are always quantized per tensor.
        scheme: "symmetric" (a step size, zero maps to zero; DFQF Eq. 10) or "affine" (two bounds; GDFQ Eq. 6).
        step: "learned" trains step sizes (or bounds) with the weights, "fixed" keeps the calibrated ones. A fixed
            affine weight range is computed from the weights in each forward pass, as in GDFQ.
        skip: "quantized" quantizes a tensor once for all its consumers, the skip connection included; "float"
            quantizes it for the layers only, as many later papers do without saying so.
        layers: bit widths of the weights of single layers by name, in place of the above (``sensitivity`` proposes
            some); given as a mapping, kept as sorted pairs.

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
            if not _is_bit_width(bits):
                raise InputError(f'layers: "{layer}" has {bits!r} bits; give a whole number from 2 to 16')
        for name in ("weight_bits", "activation_bits", "edge_bits"):
            check_bits(getattr(self, name), name)
        choices = {"granularity": Granularity, "scheme": Scheme, "step": Step, "skip": Skip}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                options = " or ".join(f'"{option}"' for option in get_args(allowed))
                raise InputError(f"{name}={getattr(self, name)!r} must be {options}")

    @classmethod
    def parse(cls, bits: "str | QuantSpec | Mapping[str, Any]", **changes: Any) -> "QuantSpec":
        """A specification from ``"w4a4"`` (any case), from another one, or from a mapping; ``changes`` set fields.

        A mapping gives weight bit widths by layer name, and under "default" those of the other layers:
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
        """The protocol of GDFQ's tables and most after it: all layers at ``bits``, weights per output channel."""
        fields: dict[str, Any] = {"edge_bits": bits, "granularity": "channel"} | changes
        return cls(bits, bits, **fields)

    def __str__(self) -> str:
        ends = f"ends {self.edge_bits} bits"
        single = f", {len(dict(self.layers))} layers apart" if self.layers else ""
        kind = f"{self.scheme}, {self.step} steps, skip {self.skip}"
        return f"W{self.weight_bits}A{self.activation_bits} ({ends}, per {self.granularity}, {kind}{single})"

    def weight_bits_of(self, layer: str, at_edge: bool) -> int:
        """Bit width of a layer's weights; ``at_edge`` for the first and the last layer."""
        return dict(self.layers).get(layer, self.edge_bits if at_edge else self.weight_bits)


def check_bits(bits: Any, name: str = "bits") -> None:
    """Raise InputError unless ``bits``, the argument ``name``, is a whole number from 2 to 16."""
    if not _is_bit_width(bits):
        raise InputError(f"{name}={bits!r} must be a whole number from 2 to 16")


def _is_bit_width(bits: Any) -> bool:
    return isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 16


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer value of ``bits`` bits: [-2^(n-1), 2^(n-1) - 1], or [0, 2^n - 1] unsigned."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
