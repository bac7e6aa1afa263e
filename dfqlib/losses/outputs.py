"""Terms of the logits: confident, balanced, agreeing or disagreeing."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.errors import InputError


def inception_score_loss(logits: Tensor, alpha: float = 40.0) -> Tensor:
    """Confident on each image, balanced over the batch (DFQF, Eq. 5).

    Computes ``mean_x H(p(y|x)) - alpha * H(p(y))`` with ``p = softmax(logits)``; lower is better.

    Args:
        logits: teacher outputs, shape (batch, classes).
        alpha: weight of the balance term, in nats per nat; DFQF uses 40.

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
        Scalar tensor between 0 (one class only) and log(classes) (balanced): to be made large.

    Taught in notebook 04.
    """
    # logsumexp over the batch keeps a class of vanishing probability from turning into 0 * log 0.
    log_p = F.log_softmax(logits, dim=1).logsumexp(0) - math.log(len(logits))
    return -(log_p.exp() * log_p).sum()


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels that images were made for (GDFQ, Eq. 4 and Eq. 7).

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
    """Divergence of the student's class probabilities from the teacher's (DFQF Eq. 2, GDFQ Eq. 8).

    Computes ``KL(softmax(teacher / T) || softmax(student / T)) * T^2``, the mean over the batch. The factor
    keeps the gradient's size independent of the temperature.

    Args:
        student: student logits, shape (batch, classes).
        teacher: teacher logits, shape (batch, classes).
        temperature: T; 1 in DFQF, 20 in GDFQ.
        variant: "paper", or "released" to divide by the number of classes too, as GDFQ's code does.

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
    """What a generator minimizes to find images on which student and teacher disagree (DFQF, Eq. 8; AKD).

    The negative of ``distillation_loss`` at temperature 1.

    Args:
        student: student logits, shape (batch, classes).
        teacher: teacher logits, shape (batch, classes).

    Returns:
        Scalar tensor, differentiable in both; 0 or less.

    Taught in notebook 04.
    """
    return -distillation_loss(student, teacher)


def dfad_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of the logits (DFAD): the student descends it, the generator ascends it.

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

    Minimized by images on which student and teacher disagree. The divergence is in nats: the loss lies
    between ``1 - log 2`` and 1.

    Args:
        student: student logits, shape (batch, classes).
        teacher: teacher logits, shape (batch, classes).
        temperature: softens both before they are compared.

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
