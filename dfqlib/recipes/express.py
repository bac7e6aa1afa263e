"""Express, our own quick path: a few hundred images out of noise, then a short fine-tuning against the teacher.

1. Optimize a batch of noise until the inputs of each BatchNorm layer have its stored mean and variance (norms not
   squared, as in DeepInversion; ``losses.bn_norm_loss``) and the teacher recognizes each image's label, under a random
   shift and flip.
2. Quantize the network and set its step sizes from those images by the MSE criterion.
3. Fine-tune weights and step sizes against the teacher's soft outputs, with CutMix of the images, BatchNorm fixed.

Ideas of four later papers are options, off by default: see ``recipes.ideas``.

Taught in notebook 07.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dfqlib import losses, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.deploy import integer
from dfqlib.errors import InputError
from dfqlib.recipes.base import Outcome
from dfqlib.recipes.ideas import Ideas, label_term, learned_labels, wanted_labels
from dfqlib.spec import QuantSpec
from dfqlib.training import distillation
from dfqlib.training.augment import low_pass, shift_and_flip
from dfqlib.training.settings import BF16, BaseSettings, setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = True


@dataclass(frozen=True, eq=False)
class Synthesis(BaseSettings):
    """Settings of making images out of noise."""

    images: int = setting(256, "number of synthetic images", low=2)
    synthesis_batch: int = setting(
        256, "images optimized together, at most; BatchNorm statistics are matched over them", low=2
    )
    parametrization: Literal["pixels", "fourier"] = setting(
        "pixels", "what is optimized: the images' pixels, or their Fourier coefficients, scaled by 1 / frequency"
    )
    synthesis_steps: int = setting(200, "iterations of Adam on the images", low=1)
    synthesis_lr: float = setting(0.1, "their learning rate, which falls to zero along a cosine")
    plateau: float = setting(
        0.01,
        "end synthesis in its last quarter once 20 iterations lower the loss by less than this share; 0: never",
        high=1,
    )
    label_weight: float = setting(0.2, "weight of the label cross-entropy beside the BatchNorm loss")
    shift: int = setting(2, "largest random shift of the images, in pixels")
    flip: bool = setting(True, "mirror images at random")
    bf16: bool = setting(True, BF16)


@dataclass(frozen=True)
class Settings(Ideas, distillation.QuantizedTuning, Synthesis):
    """Settings of express: of synthesis, of fine-tuning, and of later papers' ideas, which 0 switches off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_weight == self.hard_samples == 0 and (self.superposed or self.selective_labels):
            name = "superposed" if self.superposed else "selective_labels"
            raise InputError(
                f"{name}={getattr(self, name)} is about labels, which label_weight=0 keeps out of the images; set "
                f"label_weight or hard_samples above 0, or {name}=0"
            )
        if self.adaptability and self.images < 4:
            raise InputError(f"images={self.images} is too few for adaptability, which splits them; take at least 4")
        distillation.check_acting(self, "selective_labels")


BUDGETS = {"quick": Settings(), "published": Settings(images=512, steps=1200)}
"""No paper is behind "published": it is what a search (results/search.json) found to pay within minutes."""


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Noise to images, images to ranges, ranges and weights fine-tuned."""
    images = synthesize(task, settings)
    calibrated = calibrated_student(task, spec, images)
    if settings.adaptability:
        images = torch.cat([images, synthesize(task, settings, calibrated)])
    student = copy.deepcopy(calibrated)
    fine_tune(task, student, images, spec, settings, learned_labels(task, images, settings))
    return Outcome(student, images, calibrated)


def synthesize(task: Task, settings: Settings, rival: nn.Module | None = None) -> Tensor:
    """Images with the stored BatchNorm statistics that the teacher recognizes as their labels, (images, C, H, W).

    With ``adaptability`` it is the first half of them, and with a ``rival`` the second half, made against it.
    """
    weight, label_loss = label_term(settings, settings.label_weight, rival)

    def objective(images: Tensor, logits: Tensor, probe: BatchNormProbe, labels: Tensor) -> dict[str, Tensor]:
        statistics = losses.bn_norm_loss(probe)
        label = label_loss(images, logits, labels)
        return {"loss": statistics + weight * label, "bn": statistics, "label": label}

    labels = wanted_labels(task, settings.images, settings)
    if settings.adaptability:
        labels = labels.tensor_split([settings.images // 2])[0 if rival is None else 1]
    batches = math.ceil(len(labels) / settings.synthesis_batch)
    augment = partial(shift_and_flip, shift=settings.shift, flip=settings.flip)
    images = synthesis.from_noise(
        task.teacher, labels, task.image_shape, objective,
        synthesis.adam(settings.synthesis_lr, settings.synthesis_steps), settings.synthesis_steps,
        task.session, batch=math.ceil(len(labels) / batches), first_batch=0 if rival is None else batches,
        augment=augment, bf16=settings.bf16, plateau=settings.plateau,
        parametrization=settings.parametrization,
    )  # fmt: skip
    return low_pass(images, settings.low_pass) if settings.low_pass else images


def fine_tune(
    task: Task,
    student: nn.Module,
    images: Tensor,
    spec: QuantSpec,
    settings: distillation.QuantizedTuning,
    labels: Tensor | None = None,
) -> None:
    """Distill the teacher into ``student`` on mixtures of ``images`` (and teach it weighted ``labels``), in place."""
    first_integer_step = settings.steps - round(settings.integer_share * settings.steps)
    if settings.integer_share:
        integer.prepare(student, images)
    as_exported = integer.simulate(student) if settings.integer_share else student
    distillation.fine_tune(
        task, student, images, settings, distillation.peak_lr(settings.lr, spec),
        network_at=lambda index: student if index < first_integer_step else as_exported,
        additions=distillation.Additions(labels, settings.perturbation, settings.alignment), compiled=settings.compiled,
    )  # fmt: skip
    if settings.integer_share:
        integer.settle(student)
