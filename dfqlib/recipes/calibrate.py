"""Calibrate: post-training quantization alone. Weights are rounded, ranges set; nothing is trained.

1. Images: made from noise exactly as express makes them, or real ones that are given.
2. Quantize the network and set the clip threshold of every weight and activation by one of four criteria.

Taught in notebook 02.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dfqlib.recipes import base, express, given
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training.settings import setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False


@dataclass(frozen=True, eq=False)
class Settings(express.Synthesis):
    """Settings of calibrate; all but ``images`` and ``clip`` are express's and act only where images are made."""

    images: int | Tensor = setting(  # type: ignore[assignment]  # noqa: RUF009
        256, "how many to make, or the images themselves, (N, C, H, W), normalized like the data"
    )
    clip: Literal["max", "mse", "aciq", "kl"] = setting("mse", base.CLIP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.images, Tensor):
            given.check(self.images)
        else:
            self.synthesis()  # refuses what express refuses

    def synthesis(self) -> express.Settings:
        """Settings of express that make these images."""
        shared = {item.name: getattr(self, item.name) for item in dataclasses.fields(express.Synthesis)}
        return express.Settings(**shared)


BUDGETS = {"quick": Settings(), "published": Settings(images=512)}


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Images, and ranges from them."""
    if isinstance(settings.images, Tensor):
        images = given.take(task, settings.images)
    else:
        base.require_batchnorm(task.teacher, "calibrate")
        images = express.synthesize(task, settings.synthesis())
    calibrated = calibrated_student(task, spec, images, method=settings.clip)
    return Outcome(calibrated, images, calibrated)
