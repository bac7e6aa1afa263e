"""Ideas of later papers for ``express``, each an option, off by default, and adapted to images without a generator.

* ``superposed`` (Qimera, NeurIPS 2021): images between classes, by mixed targets of the label loss.
* ``hard_samples`` (HAST, CVPR 2023): images that stay hard. Its ``perturbation`` and ``alignment`` are settings of
  fine-tuning, ``training.distillation.QuantizedTuning``.
* ``adaptability`` (AdaDFQ, CVPR 2023): half of the images made against the calibrated student.
* ``low_pass``, ``selective_labels`` (SynQ, ICLR 2025): blurred images, and labels learned where the teacher recognizes
  them.

Their losses are in ``losses.later``, their other parts in ``training.additions``.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import losses, synthesis
from dfqlib.network.inference import predict
from dfqlib.training import additions
from dfqlib.training.settings import BaseSettings, setting
from dfqlib.training.task import Task

LabelLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images, the teacher's logits of them, labels) -> how far the images are from their labels."""


@dataclass(frozen=True, eq=False)
class Ideas(BaseSettings):
    """What express takes from later papers."""

    superposed: float = setting(0.0, "probability that an image's label is a mixture of classes; Qimera's 0.4", high=1)
    hard_samples: float = setting(
        0.0,
        "weight beta of HAST's (1 - p_y)^2 CE, in place of label_weight and the plain cross-entropy; HAST's 10 is "
        "for squared BatchNorm losses, here 1 already keeps the statistics from matching: start at 0.2",
    )
    adaptability: float = setting(
        0.0,
        "weight of AdaDFQ's generator loss, in place of the cross-entropy, in the second half of the images, which "
        "does not set the ranges; AdaDFQ's 1 is for a generator that keeps learning, here start at 0.2",
    )
    low_pass: float = setting(
        0.0, "standard deviation, in pixels, of the blur of the finished images; SynQ's 0.05 to 0.25 at 32 pixels"
    )
    selective_labels: float = setting(
        0.0,
        "the student also learns the labels of images whose difficulty 1 - p_y is below this threshold, measured once "
        "on the whole image (in SynQ at each batch); SynQ's 0.5 to 0.7",
        high=1,
    )
    student_label_weight: float = setting(0.05, "weight of the cross-entropy with these labels; SynQ's 0.005 to 5")


def wanted_labels(task: Task, count: int, settings: Ideas) -> Tensor:
    """The label of each image: classes, shape (count,), or with ``superposed`` probabilities (count, classes)."""
    labels = synthesis.balanced_labels(count, task.classes, task.device)
    if not settings.superposed:
        return labels
    return additions.superposed_labels(labels, task.classes, settings.superposed, task.session.reseed("mixtures"))


def label_term(settings: Ideas, label_weight: float, rival: nn.Module | None = None) -> tuple[float, LabelLoss]:
    """Weight and loss of the labels: cross-entropy, that of hard samples, or with a ``rival`` that of adaptability."""
    if rival is not None:
        student = copy.deepcopy(rival).requires_grad_(False)
        return settings.adaptability, lambda images, logits, labels: losses.adaptability_loss(
            logits.float(), student(images).float(), labels
        )
    if settings.hard_samples:
        return settings.hard_samples, lambda _, logits, labels: losses.hard_sample_loss(logits.float(), labels)
    return label_weight, lambda _, logits, labels: F.cross_entropy(logits, labels)


def learned_labels(task: Task, images: Tensor, settings: Ideas) -> Tensor | None:
    """The labels that the student learns too, times their weight, (images, classes); zeros where it does not."""
    if not settings.selective_labels:
        return None
    logits = predict(task.teacher, images).to(task.device)
    trusted = losses.trusted_labels(logits, wanted_labels(task, len(images), settings), settings.selective_labels)
    return settings.student_label_weight * trusted
