"""DeepInversion (Yin et al., CVPR 2020): class images out of noise, and images on which student and teacher disagree.

1. *DeepInversion.* Optimize noise x until the teacher T recognizes its label y, ``CE(T(x), y) + r sum_l (||mu_hat_l -
   mu_l|| + ||v_hat_l - v_l||) + c_tv TV(x)``: norms not squared, a smooth image, under a random shift and flip at each
   iteration.
2. *The student* S learns T's outputs on them: quantized (the paper only distils), with its ranges set from them, or
   smaller, from scratch.
3. *Adaptive DeepInversion.* Each further round makes images with ``c (1 - JS(S(x), T(x)))`` in their loss as well, both
   outputs softened by tau = 3: images on which S and T differ. S continues on all images made so far.

Left out: the l2 norm of the images beside the smoothness, of weight 3e-8 for CIFAR in the paper and off in the
released command. Where the released code for CIFAR differs: it shifts the images but does not mirror them
(``flip=False``); it clips probabilities to 0.01 ... 0.99 before it compares the two outputs; without arguments it takes
r = 100 and lr = 0.1, with those of "the paper" r = 10 and lr = 0.05 as here, and for "better reconstructed images"
lr = 0.1 and c_tv = 0.001.

Taught in notebook 03.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dfqlib import losses, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training import distillation
from dfqlib.training.augment import shift_and_flip
from dfqlib.training.settings import setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = True


@dataclass(frozen=True)
class Settings(distillation.Tuning):
    """Settings of (Adaptive) DeepInversion; those of synthesis are the paper's for CIFAR-10.

    ``budget="quick"`` deviates so that minutes suffice: two rounds of 128 images and 150 iterations on their pixels, at
    a learning rate of 0.1 that falls to zero, 200 iterations of fine-tuning (300 of distillation) after each, all in
    bfloat16.
    """

    rounds: int = setting(4, "1 is DeepInversion; with more, all but the first are Adaptive", low=1)
    images: int = setting(512, "images of each round", low=1)
    synthesis_batch: int = setting(256, "images optimized together", low=2)
    synthesis_steps: int = setting(2000, "iterations of Adam on the pixels of each batch")
    synthesis_lr: float = setting(0.05, "their learning rate")
    synthesis_schedule: Literal["constant", "cosine"] = setting("constant", "of synthesis_lr; the paper's is constant")
    r: float = setting(10.0, "weight of the BatchNorm statistics")
    tv_weight: float = setting(2.5e-5, "weight of the smoothness")
    competition_weight: float = setting(10.0, "weight c of 1 - JS; 0 switches it off")
    tau: float = setting(3.0, "temperature of both outputs in JS", low=1e-3)
    steps: int = setting(1000, "iterations of fine-tuning in each round")
    distill_steps: int = setting(10_000, "the same in distill")
    distill_lr: float = setting(5e-3, "peak learning rate in distill")
    bf16: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.competition_weight > 0 and self.rounds > 1 and self.steps == 0:
            raise InputError(
                f"steps=0 leaves competition_weight={self.competition_weight} a student that has learned nothing to "
                "compete with; set steps above 0, or rounds=1"
            )


BUDGETS = {
    "quick": Settings(
        rounds=2, images=128, synthesis_batch=128, synthesis_steps=150, synthesis_lr=0.1, synthesis_schedule="cosine",
        steps=200, distill_steps=300, bf16=True,
    ),
    "published": Settings(),
}  # fmt: skip


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Images, ranges from them, and rounds of fine-tuning and further images against the student."""
    images = invert(task, settings, 0)
    calibrated = calibrated_student(task, spec, images)
    student = copy.deepcopy(calibrated)
    lr = distillation.peak_lr(settings.lr, spec)
    learn = partial(distillation.fine_tune, task, student, settings=settings, lr=lr)
    return Outcome(student, in_rounds(task, student, images, learn, "fine-tuning", settings), calibrated)


def distill(task: Task, student: nn.Module, settings: Settings) -> Outcome:
    """Images, and rounds of training from scratch and further images against the student."""
    longer = dataclasses.replace(settings, steps=settings.distill_steps)
    learn = partial(distillation.fine_tune, task, student.train(), settings=longer, lr=settings.distill_lr)
    images = invert(task, settings, 0)
    return Outcome(student, in_rounds(task, student, images, learn, "distillation", settings))


def in_rounds(
    task: Task, student: nn.Module, images: Tensor, learn: Callable[..., None], phase: str, settings: Settings
) -> Tensor:
    """Train the student on ``images``, in each further round also on those made against it; returns all images."""
    for index in range(settings.rounds):
        if index:
            images = torch.cat([images, invert(task, settings, index, student)])
        learn(images=images, phase=f"{phase} {index + 1}" if settings.rounds > 1 else phase)
    return images


def invert(task: Task, settings: Settings, index: int, student: nn.Module | None = None) -> Tensor:
    """The images of a round, shape (images, C, H, W); against the student, if there is one."""
    rival = None if student is None else copy.deepcopy(student).eval().requires_grad_(False)

    def objective(images: Tensor, logits: Tensor, probe: BatchNormProbe, labels: Tensor) -> dict[str, Tensor]:
        logits = logits.float()
        loss = losses.deep_inversion_loss(logits, labels, probe, images, settings.r, settings.tv_weight)
        if rival is None or settings.competition_weight == 0:
            return {"loss": loss}
        competition = losses.competition_loss(rival(images).float(), logits, settings.tau)
        return {"loss": loss + settings.competition_weight * competition, "competition": competition}

    steps, batches = settings.synthesis_steps, math.ceil(settings.images / settings.synthesis_batch)
    optimizer = synthesis.adam(settings.synthesis_lr, steps if settings.synthesis_schedule == "cosine" else None)
    return synthesis.from_noise(
        task.teacher, synthesis.balanced_labels(settings.images, task.classes, task.device), task.image_shape,
        objective, optimizer, steps, task.session, batch=settings.synthesis_batch, first_batch=index * batches,
        bf16=settings.bf16, augment=partial(shift_and_flip, shift=settings.shift, flip=settings.flip),
    )  # fmt: skip
