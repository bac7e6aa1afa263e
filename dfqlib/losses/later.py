"""Terms of later papers, each an option of the express recipe: hard samples, adaptable samples, trusted labels."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.errors import InputError


def difficulty(logits: Tensor, labels: Tensor) -> Tensor:
    """How far each image is from showing its label: ``1 - p_y`` (HAST, SynQ).

    For a mixture of classes, which the papers do not have, it is the total variation distance
    ``1/2 sum_k |p_k - y_k|``, which is ``1 - p_y`` for a single class.

    Args:
        logits: teacher outputs, shape (batch, classes).
        labels: classes of shape (batch,), or probabilities of shape (batch, classes).

    Returns:
        Shape (batch,), from 0 (shown with certainty) to 1.
    """
    return 0.5 * (F.softmax(logits, dim=1) - as_probabilities(logits, labels)).abs().sum(1)


def as_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels as rows of probabilities, shape (batch, classes), whichever form they have."""
    return F.one_hot(labels, logits.shape[1]).to(logits) if labels.dim() == 1 else labels.to(logits)


def hard_sample_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Label cross-entropy in which images that already show their label count less (HAST, CVPR 2023).

    Computes ``mean_x (1 - p_y)^gamma CE(t, y)``: the pull ends before the image is easy. As in the released
    code, the weight has a gradient too.

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
    """Images on which teacher and student neither wholly agree nor wholly disagree (AdaDFQ, CVPR 2023).

    Computes ``a_ds CE(t - s, y) + a_as CE(t + s, y) + mean_x [max(low - h, 0) + max(h - high, 0)]`` with the
    entropy h of softmax(t - s), divided by log(classes). An entropy of 1 means agreement: t - s says nothing.
    (The released code also subtracts the batch's smallest entropy from h, so that one image of each batch is
    always below ``low``; here h is that of the image alone.)

    Args:
        teacher: teacher logits t, shape (batch, classes).
        student: student logits s, shape (batch, classes).
        labels: classes of shape (batch,), or probabilities of shape (batch, classes).
        disagreement_weight: a_ds; the released code's for CIFAR-10, as the three that follow.
        agreement_weight: a_as.
        low: smallest entropy that costs nothing, as a share of log(classes).
        high: largest one.

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
    """Distance of the student's channel attention from the teacher's (feature alignment of HAST, CVPR 2023).

    The attention of a feature map is its mean square over the pixels of each channel, brought to length 1 for
    each image. Computes ``sum_l mean_(x, c) (a_S - a_T)^2``.

    Args:
        student: feature maps of the student, each (batch, channels, height, width) or (batch, channels).
        teacher: those of the teacher at the same places.

    Returns:
        Scalar tensor, differentiable in both.

    Raises:
        InputError: there are none, or not as many of one as of the other.
    """
    if len(student) != len(teacher) or not student:
        raise InputError(f"{len(student)} student and {len(teacher)} teacher feature maps; give as many, at least one")
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(_attention(s) - _attention(t)).square().mean() for s, t in pairs]).sum()


def _attention(features: Tensor) -> Tensor:
    return F.normalize(features.float().square().flatten(2).mean(-1) if features.dim() > 2 else features.float() ** 2)


def trusted_labels(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Labels without those of difficult images, which the teacher itself does not see (SynQ, ICLR 2025).

    ``label_loss(student, trusted_labels(teacher, y, tau))`` is ``mean_x [1 - p_y < tau] CE(s, y)``.

    Args:
        logits: teacher outputs, shape (batch, classes).
        labels: classes of shape (batch,), or probabilities of shape (batch, classes).
        threshold: tau; SynQ searches 0.5 ... 0.7.

    Returns:
        Probabilities, shape (batch, classes); a row of zeros where the label is not trusted.
    """
    trusted = difficulty(logits, labels) < threshold
    return as_probabilities(logits, labels) * trusted.unsqueeze(1)
