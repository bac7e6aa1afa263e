"""Objectives of generators and students: weighted sums of the papers' loss terms, each a scalar tensor."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.losses.images import total_variation_loss
from dfqlib.losses.outputs import (
    adversarial_loss,
    batch_entropy,
    check_variant,
    distillation_loss,
    inception_score_loss,
    label_loss,
    one_hot_loss,
    sample_entropy,
)
from dfqlib.losses.statistics import bn_divergence_loss, bn_gaussian_kl_loss, bn_l2_loss, bn_norm_loss


def dfqf_generator_loss(
    teacher: Tensor,
    student: Tensor,
    probe: BatchNormProbe,
    alpha: float = 40.0,
    bn_weight: float = 0.1,
    adversarial_weight: float = 5.0,
) -> Tensor:
    """Generator's objective (DFQF, Eq. 9): ``L_is + bn_weight * L_bn + adversarial_weight * L_adv``.

    The terms are those of the released code: see ``bn_divergence_loss`` and ``adversarial_loss``.

    Args:
        teacher: teacher logits of the generated images, shape (batch, classes).
        student: student logits of the same images, shape (batch, classes).
        probe: a probe of the teacher after a forward pass of the images.
        alpha: weight of the balance within the inception score.
        bn_weight: weight of ``bn_divergence_loss``.
        adversarial_weight: weight of ``adversarial_loss``.

    Taught in notebook 04.
    """
    score, adversarial = inception_score_loss(teacher, alpha), adversarial_loss(student, teacher)
    return score + bn_weight * bn_divergence_loss(probe) + adversarial_weight * adversarial


def gdfq_generator_loss(
    teacher: Tensor,
    labels: Tensor,
    probe: BatchNormProbe,
    bn_weight: float = 0.1,
    variant: str = "paper",
    label_weight: float = 1.0,
) -> Tensor:
    """Generator's objective (GDFQ, Eq. 9): ``label_weight * CE + bn_weight * BNS``.

    Args:
        teacher: teacher logits of the generated images, shape (batch, classes).
        labels: what the images were generated for, as in ``label_loss``.
        probe: a probe of the teacher after a forward pass of the images.
        bn_weight: weight of ``bn_l2_loss``.
        variant: form of ``bn_l2_loss``, "paper" or "released".
        label_weight: weight of ``label_loss``; 1 in the paper, 0 for the ablation without it.

    Taught in notebook 04.
    """
    return label_weight * label_loss(teacher, labels) + bn_weight * bn_l2_loss(probe, variant)


def gdfq_student_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    kd_weight: float = 1.0,
    temperature: float = 20.0,
    variant: str = "paper",
    label_weight: float = 1.0,
) -> Tensor:
    """Quantized network's objective (GDFQ, Eq. 10): ``label_weight * CE + kd_weight * KD``.

    Args:
        student: logits of the quantized network, shape (batch, classes).
        teacher: teacher logits, shape (batch, classes).
        labels: what the images were generated for, as in ``label_loss``.
        kd_weight: weight of ``distillation_loss``.
        temperature: of ``distillation_loss``; 20 in the released code, the paper has none.
        variant: form of ``distillation_loss``, "paper" or "released".
        label_weight: weight of ``label_loss``; 1 in the paper, 0 for the ablation without it.

    Taught in notebook 06.
    """
    distillation = distillation_loss(student, teacher, temperature, variant=variant)
    return label_weight * label_loss(student, labels) + kd_weight * distillation


def akd_prior_loss(teacher: Tensor, probe: BatchNormProbe) -> Tensor:
    """Prior of AKD on real images (L_psi): stored statistics, confident images, balanced classes.

    Computes ``bn_gaussian_kl_loss + E[H(p)] - H(E[p])`` with ``p = softmax(teacher)``.

    Args:
        teacher: teacher logits of the generated images, shape (batch, classes).
        probe: a probe of the teacher after a forward pass of the images.

    Taught in notebook 08.
    """
    return bn_gaussian_kl_loss(probe) + sample_entropy(teacher) - batch_entropy(teacher)


def akd_generator_loss(
    teacher: Tensor, students: Sequence[Tensor], probe: BatchNormProbe, alpha: float = 0.01
) -> Tensor:
    """Objective of one generator of AKD: ``alpha * L_psi - mean_s KL(teacher || student s)``.

    Its mean over the generators averages the divergence over all pairs of generator and student.

    Args:
        teacher: teacher logits of this generator's images, shape (batch, classes).
        students: logits of each student on the same images.
        probe: a probe of the teacher after a forward pass of the images.
        alpha: weight of ``akd_prior_loss``.

    Raises:
        InputError: there is no student.

    Taught in notebook 08.
    """
    if not students:
        raise InputError("students is empty: give the logits of at least one student")
    disagreement = torch.stack([distillation_loss(student, teacher) for student in students]).mean()
    return alpha * akd_prior_loss(teacher, probe) - disagreement


def dafl_loss(
    teacher: Tensor,
    features: Tensor,
    one_hot_weight: float = 0.05,
    balance_weight: float = 5.0,
    activation_weight: float = 0.01,
    variant: str = "paper",
) -> Tensor:
    """Generator's objective of DAFL, which needs no BatchNorm.

    Computes ``one_hot_weight * CE(t, argmax t) - balance_weight * H(mean_x softmax(t)) - activation_weight *
    mean|features|`` for the teacher's logits t.

    Args:
        teacher: teacher logits of the generated images, shape (batch, classes).
        features: input of the teacher's last layer, any shape.
        one_hot_weight: of ``one_hot_loss``; the three defaults are the published ones for CIFAR-10.
        balance_weight: of ``batch_entropy``.
        activation_weight: of the mean absolute feature.
        variant: "paper" measures the entropy in nats, "released" in decimal digits as the authors' code does.

    Raises:
        InputError: ``variant`` is unknown.

    Taught in notebook 05.
    """
    check_variant(variant)
    unit = math.log(10) if variant == "released" else 1.0
    balance = -batch_entropy(teacher) / unit
    activation = -features.abs().mean()
    return one_hot_weight * one_hot_loss(teacher) + balance_weight * balance + activation_weight * activation


def deep_inversion_loss(
    teacher: Tensor, labels: Tensor, probe: BatchNormProbe, images: Tensor, bn_weight: float, tv_weight: float
) -> Tensor:
    """Objective of DeepInversion: ``CE + bn_weight * sum_l (||mu_hat - mu|| + ||v_hat - v||) + tv_weight * TV``.

    Args:
        teacher: teacher logits of the images, shape (batch, classes).
        labels: targets of the images, as in ``label_loss``.
        probe: a probe of the teacher after a forward pass of the images.
        images: shape (batch, channels, height, width).
        bn_weight: weight of ``bn_norm_loss`` with ``reduction="sum"``.
        tv_weight: weight of ``total_variation_loss``.

    Taught in notebook 03.
    """
    statistics = bn_norm_loss(probe, reduction="sum")
    return label_loss(teacher, labels) + bn_weight * statistics + tv_weight * total_variation_loss(images)
