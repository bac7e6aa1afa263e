"""Losses of the logits: confidence and balance of the teacher, agreement of student and teacher."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.errors import InputError


def inception_score_loss(logits: Tensor, alpha: float = 40.0) -> Tensor:
    """Confident on each image, balanced over the batch (DFQF, Eq. 5).

    Computes ``mean_x H(p(y|x)) - alpha * H(p(y))`` with ``p = softmax(logits)``.

    Args:
        logits: teacher outputs, shape (batch, classes).
        alpha: weight of the balance term; DFQF uses 40.

    Returns:
        Scalar tensor, differentiable in ``logits``.

    Taught in notebook 04.
    """
    return sample_entropy(logits) - alpha * batch_entropy(logits)


def sample_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of each image's class probabilities, in nats: ``mean_x H(softmax(logits))`` (AKD, DFQF).

    Args:
        logits: shape (batch, classes).

    Returns:
        Scalar tensor between 0 (certain) and log(classes).

    Taught in notebook 04.
    """
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1).mean()


def batch_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean class probabilities, in nats: ``H(mean_x softmax(logits))`` (AKD, DFQF, DAFL).

    Args:
        logits: shape (batch, classes).

    Returns:
        Scalar tensor between 0 (one class only) and log(classes) (balanced); generators maximize it.

    Taught in notebook 04.
    """
    # logsumexp over the batch keeps a class of vanishing probability from turning into 0 * log 0.
    log_p = F.log_softmax(logits, dim=1).logsumexp(0) - math.log(len(logits))
    return -(log_p.exp() * log_p).sum()


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels that the images were generated for (GDFQ, Eq. 4 and Eq. 7).

    Args:
        logits: shape (batch, classes).
        labels: classes of shape (batch,), or probabilities of shape (batch, classes) for superposed labels.

    Returns:
        Scalar tensor, differentiable in ``logits``.

    Taught in notebook 04.
    """
    return F.cross_entropy(logits, labels)


def one_hot_loss(logits: Tensor) -> Tensor:
    """Cross-entropy with the network's own most likely class (DAFL): low where it is certain.

    Args:
        logits: teacher outputs, shape (batch, classes).

    Returns:
        Scalar tensor, differentiable in ``logits``.

    Taught in notebook 05.
    """
    return F.cross_entropy(logits, logits.argmax(1))


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, variant: str = "paper") -> Tensor:
    """KL divergence of the student's class probabilities from the teacher's (GDFQ, Eq. 8; DFQF, Eq. 2).

    Computes ``KL(softmax(teacher / T) || softmax(student / T)) * T^2``, the mean over the batch; ``T^2`` keeps the
    size of the gradient independent of T. DFQF's Eq. 2 prints the cross-entropy of the two, which differs by the
    teacher's entropy and has the same gradient for the student; its released code uses this divergence.

    Args:
        student: student logits, shape (batch, classes).
        teacher: teacher logits, shape (batch, classes).
        temperature: T. Neither paper has one; GDFQ's released code uses 20.
        variant: "paper", or "released" to also divide by the number of classes, as GDFQ's code does.

    Returns:
        Scalar tensor, differentiable in both.

    Raises:
        InputError: the shapes differ, the temperature is not positive, or ``variant`` is unknown.

    Taught in notebook 05.
    """
    check_variant(variant)
    _check_same_shape(student, teacher)
    if not temperature > 0:
        raise InputError(f"temperature={temperature} must be positive, for example 1.0")
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(student / temperature, dim=1)
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    return divergence / student.shape[1] if variant == "released" else divergence


def adversarial_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Generator's loss for images on which student and teacher disagree (DFQF, Eq. 8; AKD).

    The negative of ``distillation_loss`` at temperature 1, as in DFQF's released code and in AKD. With the
    cross-entropy of DFQF's Eq. 2 the generator would also minimize ``-H(softmax(teacher))``, and so be rewarded for
    images on which the teacher is undecided.

    Args:
        student: student logits, shape (batch, classes).
        teacher: teacher logits, shape (batch, classes).

    Returns:
        Scalar tensor, differentiable in both; 0 or less.

    Taught in notebook 04.
    """
    return -distillation_loss(student, teacher)


def dfad_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of the logits (DFAD): minimized by the student, maximized by the generator.

    Args:
        student: student logits, shape (batch, classes).
        teacher: teacher logits, shape (batch, classes).

    Returns:
        Scalar tensor, differentiable in both.

    Raises:
        InputError: the shapes differ.

    Taught in notebook 05.
    """
    _check_same_shape(student, teacher)
    return (teacher - student).abs().mean()


def competition_loss(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """One minus the Jensen-Shannon divergence of the two outputs (Adaptive DeepInversion).

    Minimized by images on which student and teacher disagree. The divergence is in nats, so the loss lies between
    ``1 - log 2`` and 1.

    Args:
        student: student logits, shape (batch, classes).
        teacher: teacher logits, shape (batch, classes).
        temperature: divides both logits.

    Returns:
        Scalar tensor, differentiable in both.

    Raises:
        InputError: the shapes differ or the temperature is not positive.

    Taught in notebook 03.
    """
    _check_same_shape(student, teacher)
    if not temperature > 0:
        raise InputError(f"temperature={temperature} must be positive, for example 3.0")
    log_p, log_q = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergences = [F.kl_div(log_m, log_r, reduction="batchmean", log_target=True) for log_r in (log_p, log_q)]
    return 1 - torch.stack(divergences).mean()


def check_variant(variant: str) -> None:
    """Raise InputError unless ``variant`` is "paper" or "released"."""
    if variant not in ("paper", "released"):
        raise InputError(f"variant={variant!r} is unknown: use 'paper' or 'released'")


def _check_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: "
            "give logits of the same images and classes"
        )
