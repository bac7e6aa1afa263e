"""dfqlib: quantize a trained image classifier without its training data.

>>> import dfqlib
>>> model = dfqlib.load_model("digits_resnet8")
>>> report = dfqlib.quantize(model, image_shape=(1, 16, 16), bits="w2a2")
>>> dfqlib.evaluate(report.model, dfqlib.load_data("digits"))
"""

import sys

import torch

from dfqlib.errors import InputError, NonFiniteError

_TORCH_FLOOR = (2, 6)  # as in pyproject.toml; checked before an import fails for lack of something newer
if tuple(map(int, torch.__version__.split(".")[:2])) < _TORCH_FLOOR:
    raise InputError(
        f"dfqlib needs torch {'.'.join(map(str, _TORCH_FLOOR))} or newer, this is {torch.__version__}; "
        "pip install -U torch torchvision"
    )

from dfqlib import batchnorm, clipping, data, generators, losses, models, quantizer, synthesis, training
from dfqlib.data import image_folder, load_data
from dfqlib.deploy import integer
from dfqlib.deploy import onnx as export
from dfqlib.deploy.onnx import export_onnx, verify
from dfqlib.deploy.onnx.verify import verify_export
from dfqlib.deploy.saving import load_quantized, save_quantized
from dfqlib.evaluation.diagnosis import diagnose
from dfqlib.evaluation.metrics import agreement, compare, evaluate
from dfqlib.evaluation.sensitivity import sensitivity
from dfqlib.models import load_model
from dfqlib.models.checkpoints import load_checkpoint
from dfqlib.recipes import Report, distill, quantize
from dfqlib.spec import QuantSpec

for _alias, _module in {"integer": integer, "export": export, "export.verify": verify}.items():
    sys.modules[f"dfqlib.{_alias}"] = _module  # names from before the modules moved into packages

__version__ = "0.1.0"

__all__ = [
    "InputError", "NonFiniteError", "QuantSpec", "Report", "agreement", "batchnorm", "clipping", "compare", "data",
    "diagnose", "distill", "evaluate", "export_onnx", "generators", "image_folder", "integer", "load_checkpoint",
    "load_data", "load_model", "load_quantized", "losses", "models", "quantize", "quantizer", "save_quantized",
    "sensitivity", "synthesis", "training", "verify_export",
]  # fmt: skip
