"""Runs of the papers' recipes that take a second, and how their networks are compared."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import dfqlib
from dfqlib.recipes import base
from dfqlib.recipes.base import Report

SHAPE = (1, 16, 16)
IMAGES = 32
"""How many images of a generator set the ranges and are shown, in place of 256."""
GENERATOR = {"warm_up_epochs": 1, "epochs": 1, "distill_epochs": 1, "iterations": 2, "batch": 4, "latent": 16}
SHORT: dict[str, dict[str, Any]] = {
    "zeroq": {"images": 8, "iterations": 4},
    "gdfq": {"epochs": 2, "warm_up_epochs": 2, "range_epochs": 2, "iterations": 2, "batch": 4},
    "dfqf": {"epochs": 2, "warm_up_epochs": 2, "iterations": 2, "batch": 4, "latent": 50},
    "dsg": {"images": 9, "gaussian_images": 8, "iterations": 2, "steps": 2, "batch": 4},
    "deepinversion": {"images": 4, "synthesis_batch": 4, "synthesis_steps": 2, "steps": 2, "distill_steps": 2},
    "dafl": GENERATOR,
    "dfad": {**GENERATOR, "student_steps": 2},
    "akd": {**{k: v for k, v in GENERATOR.items() if k != "distill_epochs"}, "student_steps": 2},
}  # fmt: skip


def short(teacher: nn.Module, recipe: str, bits: Any = "w4a4", **changes: Any) -> Report:
    """A recipe's run of a few steps."""
    settings = {**SHORT[recipe], **changes}
    with mock.patch.object(base, "IMAGES", IMAGES):
        return dfqlib.quantize(teacher, SHAPE, bits, recipe=recipe, progress=False, **settings)


def weights(model: nn.Module | None) -> dict[str, Tensor]:
    """A copy of all that a network holds."""
    assert model is not None
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two networks hold the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
