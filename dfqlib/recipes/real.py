"""Real, the ceiling of methods without data: express's calibration and fine-tuning on real images that are given.

Nothing is synthesized. What a data-free recipe loses against this one it loses by its images; what this one loses
against the original network is lost by the widths and the schedule. The images need no labels.

1. Quantize the network and set its steps from the images by the MSE criterion.
2. Fine-tune weights and steps against the teacher's soft outputs, as express does: same loop, same settings.

Taught in notebook 07.
"""

import copy
import math
from dataclasses import dataclass

from torch import Tensor

from dfqlib.errors import InputError
from dfqlib.recipes import express, given
from dfqlib.recipes.base import Outcome, check_settings
from dfqlib.spec import QuantSpec
from dfqlib.training import distillation
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False


@dataclass(frozen=True, eq=False)
class Settings:
    """Settings of real: the images, and express's from calibration on.

    Attributes:
        images: what to tune on, (N, C, H, W), normalized like the data; required.
        calibration_images: ranges are set from so many of them, spread evenly (as many as express makes).
        steps: fine-tuning steps of ``batch`` images.
        lr: peak learning rate of Adam's one cycle at 4 bits, doubled with each bit fewer (the smaller width counts).
        step_lr: learning rate of the steps as a share of ``lr``.
        temperature: of the distillation loss.
        cutmix: share of fine-tuning batches in which a box of each image comes from another.
        shift: largest random shift in pixels; flip: random mirroring.
        integer_share, compiled, perturbation, alignment: as express's.
        bf16: compute in bfloat16 where the processor has it; the result is always evaluated in float32.
    """

    images: Tensor | None = None
    calibration_images: int = 256
    steps: int = 400
    batch: int = 64
    lr: float = 2e-4
    step_lr: float = 0.1
    temperature: float = 4.0
    cutmix: float = 1.0
    shift: int = 2
    flip: bool = True
    integer_share: float = 0.0
    compiled: bool = False
    perturbation: float = 0.0
    alignment: float = 0.0
    bf16: bool = True

    def __post_init__(self) -> None:
        check_settings(self, calibration_images=(1, math.inf), **distillation.QUANTIZED_RULES)
        distillation.check_acting(self, "perturbation", "alignment")
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
