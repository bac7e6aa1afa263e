"""Real, the upper bound for data-free methods: express's calibration and fine-tuning on real images that are given.

Nothing is synthesized. The gap between a data-free recipe and this one is due to its images; the gap between this one
and the original network is due to the bit widths and the schedule. The images need no labels.

1. Quantize the network and set its step sizes from the images by the MSE criterion.
2. Fine-tune weights and step sizes against the teacher's soft outputs, as express does: same loop, same settings.

Taught in notebook 07.
"""

import copy
from dataclasses import dataclass

from torch import Tensor

from dfqlib.errors import InputError
from dfqlib.recipes import express, given
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training import distillation
from dfqlib.training.settings import setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False


@dataclass(frozen=True, eq=False)
class Settings(distillation.QuantizedTuning):
    """Settings of real: the images, and express's from calibration on."""

    images: Tensor | None = setting(None, "images to tune on, (N, C, H, W), normalized like the data")  # noqa: RUF009
    calibration_images: int = setting(256, "images that set the ranges, spread evenly over all", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None:
            given.check(self.images)


BUDGETS = {"quick": Settings(), "published": Settings(calibration_images=512, steps=1200)}


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Images to ranges, ranges and weights fine-tuned."""
    if settings.images is None:
        raise InputError(
            f'recipe="real" fine-tunes on real images and got none: give images=, {given.LIKE}; or take '
            'recipe="express", which needs none'
        )
    images = given.take(task, settings.images)
    some = given.spread(images, settings.calibration_images)
    calibrated = calibrated_student(task, spec, some)
    student = copy.deepcopy(calibrated)
    express.fine_tune(task, student, images, spec, settings)
    return Outcome(student, images, calibrated)
