"""The loop of every phase of every recipe, and two methods to train a student: on images, or against generators.

Taught in notebook 07.
"""

from dfqlib.training.augment import shift_and_flip
from dfqlib.training.numerics import adam, channels_last, descend, mixed_precision
from dfqlib.training.session import Session
from dfqlib.training.task import Task, calibrated_student

__all__ = [
    "Session", "Task", "adam", "calibrated_student", "channels_last", "descend", "mixed_precision", "shift_and_flip",
]  # fmt: skip
