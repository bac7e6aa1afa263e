"""Fake quantization: rounding tensors to n bits in a network that can still be trained.

Two quantizers cover the literature: a *step* quantizer with a fixed or learned step size (DFQF Eq. 10, its gradient
LSQ Eq. 3), as integer hardware executes it, and an *affine* one between a lower and an upper bound (GDFQ Eq. 6).
``quantize_layers`` puts them into a network, ``calibrate`` sets their ranges from images.

Taught in notebooks 02 and 07.
"""

from dfqlib.quantizer.coverage import LOUD, Coverage, coverage
from dfqlib.quantizer.functions import affine_quantize, fake_quantize
from dfqlib.quantizer.fused import compiled, fused
from dfqlib.quantizer.insertion import (
    QuantConv2d,
    QuantLinear,
    calibrate,
    check_steps,
    parameter_groups,
    quantize_layers,
    quantizers,
    set_mode,
)
from dfqlib.quantizer.modules import AffineQuantizer, Quantizer, StepQuantizer
from dfqlib.spec import QuantSpec, integer_range

__all__ = [
    "LOUD", "AffineQuantizer", "Coverage", "QuantConv2d", "QuantLinear", "QuantSpec", "Quantizer", "StepQuantizer",
    "affine_quantize", "calibrate", "check_steps", "compiled", "coverage", "fake_quantize", "fused", "integer_range",
    "parameter_groups", "quantize_layers", "quantizers", "set_mode",
]  # fmt: skip
