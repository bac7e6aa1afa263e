"""The task of a recipe (a teacher, the shape of its images, a session), and the quantized students made for it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfqlib import quantizer
from dfqlib.spec import QuantSpec
from dfqlib.training.numerics import channels_last
from dfqlib.training.session import Session

__all__ = ["ImageShape", "Task", "calibrated_student", "quantized_student"]

ImageShape = tuple[int, int, int]


@dataclass(frozen=True)
class Task:
    """The task of a recipe.

    Attributes:
        teacher: the trained network: a copy, frozen, in eval mode, on the device.
        image_shape: (channels, height, width).
        classes: number of logits.
        session: seed, progress, history, resume file.
    """

    teacher: nn.Module
    image_shape: ImageShape
    classes: int
    session: Session

    @property
    def device(self) -> torch.device:
        """Device of the teacher."""
        return next(self.teacher.parameters()).device


def quantized_student(task: Task, spec: QuantSpec) -> nn.Module:
    """The quantized network, trainable, in eval mode, not calibrated; its ranges are trained if ``spec`` says so."""
    student = quantizer.quantize_layers(task.teacher, spec)
    channels_last(student).requires_grad_(True)
    student.meta["image_shape"] = task.image_shape
    for _, ranges in quantizer.quantizers(student):
        ranges.requires_grad_(spec.step == "learned")
    return student


def calibrated_student(
    task: Task, spec: QuantSpec, images: Tensor, *, method: str = "mse", lower_bound: float = 0.0
) -> nn.Module:
    """The quantized network, trainable, in eval mode, with its ranges set from ``images``."""
    student = quantized_student(task, spec)
    quantizer.calibrate(student, images, method, lower_bound)
    return student
