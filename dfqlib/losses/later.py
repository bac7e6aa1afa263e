"""Losses of later papers, options of the express recipe: HAST, AdaDFQ and SynQ."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.errors import InputError


def difficulty(logits: Tensor, labels: Tensor) -> Tensor:
    """Difficulty of each image: ``1 - p_y`` (HAST, SynQ).

    Computes the total variation distance ``1/2 sum_k |p_k - y_k|``, which is ``1 - p_y`` for a single class and also
    covers mixtures of classes, which the papers do not have.

    Args:
        logits: teacher outputs, shape (batch, classes).
        labels: classes of shape (batch,), or probabilities of shape (batch, classes).

    Returns:
        Shape (batch,), from 0 (the label has probability 1) to 1.
    """
    return 0.5 * (F.softmax(logits, dim=1) - as_probabilities(logits, labels)).abs().sum(1)


def as_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels as probabilities, shape (batch, classes)."""
    return F.one_hot(labels, logits.shape[1]).to(logits) if labels.dim() == 1 else labels.to(logits)


def hard_sample_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Label cross-entropy weighted by difficulty (HAST, CVPR 2023).

    Computes ``mean_x (1 - p_y)^gamma CE(t, y)``, which stops pulling an image to its label before it is easy. As in
    the released code, the weight is differentiated too.

    Args:
        logits: teacher outputs t, shape (batch, classes).
        labels: classes of shape (batch,), or probabilities of shape (batch, classes).
        gamma: 2 in HAST; 0 is the plain cross-entropy.

    Returns:
        Scalar tensor, differentiable in ``logits``.

    Raises:
        InputError: gamma is negative.
    """
    if not gamma >= 0:
        raise InputError(f"gamma={gamma} must be 0 or more, for example 2.0")
    return (difficulty(logits, labels).pow(gamma) * F.cross_entropy(logits, labels, reduction="none")).mean()


def adaptability_loss(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor,
    disagreement_weight: float = 0.2,
    agreement_weight: float = 0.1,
    low: float = 0.1,
    high: float = 0.8,
) -> Tensor:
    """Loss for images on which teacher and student neither fully agree nor fully disagree (AdaDFQ, CVPR 2023).

    Computes ``a_ds CE(t - s, y) + a_as CE(t + s, y) + mean_x [max(low - h, 0) + max(h - high, 0)]`` with
    ``h = H(softmax(t - s)) / log(classes)``, which is 1 where teacher and student agree. (The released code also
    subtracts the smallest h of the batch, so that one image of each batch is always below ``low``.)

    Args:
        teacher: teacher logits t, shape (batch, classes).
        student: student logits s, shape (batch, classes).
        labels: classes of shape (batch,), or probabilities of shape (batch, classes).
        disagreement_weight: a_ds; this and the next three defaults are the released code's for CIFAR-10.
        agreement_weight: a_as.
        low: smallest h that costs nothing.
        high: largest h that costs nothing.

    Returns:
        Scalar tensor, differentiable in both.

    Raises:
        InputError: the shapes differ, or low and high are not in order within 0 ... 1.
    """
    if student.shape != teacher.shape:
        raise InputError(f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}; give the same")
    if not 0 <= low <= high <= 1:
        raise InputError(f"low={low} and high={high} must be in order within 0 ... 1, for example 0.1 and 0.8")
    apart, together = F.cross_entropy(teacher - student, labels), F.cross_entropy(teacher + student, labels)
    log_p = F.log_softmax(teacher - student, dim=1)
    entropy = -(log_p.exp() * log_p).sum(1) / math.log(teacher.shape[1])
    outside = (low - entropy).clamp_min(0) + (entropy - high).clamp_min(0)
    return disagreement_weight * apart + agreement_weight * together + outside.mean()


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Distance between the channel attention of student and teacher (feature alignment of HAST, CVPR 2023).

    Computes ``sum_l mean_(x, c) (a_S - a_T)^2``, where the attention ``a`` of an image is the mean square of each
    channel over the pixels, normalized to length 1 over the channels.

    Args:
        student: feature maps of the student, each (batch, channels, height, width) or (batch, channels).
        teacher: feature maps of the teacher at the same layers.

    Returns:
        Scalar tensor, differentiable in both.

    Raises:
        InputError: there are none, or the numbers differ.
    """
    if len(student) != len(teacher) or not student:
        raise InputError(f"{len(student)} student and {len(teacher)} teacher feature maps; give as many, at least one")
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(_attention(s) - _attention(t)).square().mean() for s, t in pairs]).sum()


def _attention(features: Tensor) -> Tensor:
    return F.normalize(features.float().square().flatten(2).mean(-1) if features.dim() > 2 else features.float() ** 2)


def trusted_labels(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Labels of the images whose difficulty is below a threshold (SynQ, ICLR 2025).

    ``label_loss(student, trusted_labels(teacher, y, tau))`` is ``mean_x [1 - p_y < tau] CE(s, y)``.

    Args:
        logits: teacher outputs, shape (batch, classes).
        labels: classes of shape (batch,), or probabilities of shape (batch, classes).
        threshold: tau; SynQ searches 0.5 to 0.7.

    Returns:
        Probabilities, shape (batch, classes); a row of zeros where the label is not trusted.
    """
    trusted = difficulty(logits, labels) < threshold
    return as_probabilities(logits, labels) * trusted.unsqueeze(1)
