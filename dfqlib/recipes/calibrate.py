"""Calibrate: post-training quantization alone. Weights are rounded, ranges set; nothing is trained.

1. Images: made from noise exactly as express makes them, or real ones that are given.
2. Quantize the network and set the clip threshold of every weight and activation by one of four criteria.

Taught in notebook 02.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dfqlib.recipes import base, express, given
from dfqlib.recipes.base import Outcome, check_settings
from dfqlib.spec import QuantSpec
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False


@dataclass(frozen=True, eq=False)
class Settings:
    """Settings of calibrate; all but ``images`` and ``clip`` are express's and only matter where images are made.

    Attributes:
        images: how many to make, or the images themselves, (N, C, H, W), normalized like the data.
        clip: how thresholds are found, one of ``clipping.METHODS``.
        synthesis_steps: Adam steps on the pixels, at a cosine-decayed ``synthesis_lr``.
        plateau: synthesis ends early, in its last quarter, where its loss falls by less than this share in 20 steps; 0
            takes all steps.
        label_weight: weight of the label cross-entropy beside the BatchNorm loss.
        shift: largest random shift in pixels; flip: random mirroring.
        bf16: compute in bfloat16 where the processor has it; ranges are always set in float32.
    """

    images: int | Tensor = 256
    clip: Literal["max", "mse", "aciq", "kl"] = "mse"
    synthesis_steps: int = 200
    synthesis_lr: float = 0.1
    plateau: float = 0.01
    label_weight: float = 0.2
    shift: int = 2
    flip: bool = True
    bf16: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.images, Tensor):
            given.check(self.images)
        else:
            self.synthesis(self.images)  # raises for what express refuses

    def synthesis(self, images: int) -> express.Settings:
        """Those of express that make so many images."""
        return express.Settings(
            images=images, synthesis_steps=self.synthesis_steps, synthesis_lr=self.synthesis_lr, plateau=self.plateau,
            label_weight=self.label_weight, shift=self.shift, flip=self.flip, bf16=self.bf16,
        )  # fmt: skip


BUDGETS = {"quick": Settings(), "published": Settings(images=512)}


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Images to ranges, and that is all."""
    if isinstance(settings.images, Tensor):
        images = given.take(task, settings.images)
    else:
        base.require_batchnorm(task.teacher, "calibrate")
        images = express.synthesize(task, settings.synthesis(settings.images))
    calibrated = calibrated_student(task, spec, images, method=settings.clip)
    return Outcome(calibrated, images, calibrated)
