"""Terms of the logits: confident, balanced, agreeing or disagreeing."""

import math

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
    return confidence_loss(logits) - alpha * batch_entropy(logits)


def confidence_loss(logits: Tensor) -> Tensor:
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


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, element_mean: bool = False
) -> Tensor:
    """Divergence of the student's class probabilities from the teacher's (DFQF Eq. 2, GDFQ Eq. 8).

    Computes ``KL(softmax(teacher / T) || softmax(student / T)) * T^2``, the mean over the batch. The
    factor keeps the gradient's size independent of the temperature.

    Args:
        student: student logits, shape (batch, classes).
        teacher: teacher logits, shape (batch, classes).
        temperature: T; 1 in DFQF, 20 in GDFQ.
        element_mean: divide by the number of classes too, as GDFQ's released code does.

    Returns:
        Scalar tensor, differentiable in both.

    Raises:
        InputError: the shapes differ or the temperature is not positive.

    Taught in notebook 02.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: "
            "give logits of the same images and classes"
        )
    if not temperature > 0:
        raise InputError(f"temperature={temperature} must be positive, for example 1.0")
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(student / temperature, dim=1)
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    return divergence / student.shape[1] if element_mean else divergence
