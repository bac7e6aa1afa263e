"""DFAD (Fang et al., 2019): a generator trained only to find images on which student and teacher differ.

The student S descends ``mean|T(x) - S(x)|`` over the logits on a generator's images x = G(z), and G ascends it: hard
samples and nothing else, no BatchNorm, no labels. Each update of G is followed by five of S, each on new images.

- ``distill``: S is a smaller network, from scratch.
- ``quantize``: G is warmed up against a tool student, the teacher's architecture with new random weights; the quantized
  S is calibrated on G's images, and then both are trained in turn. The paper does not quantize.

Where the released code differs: for segmentation G ascends ``log(1 + mean|T - S|)``; a round begins with the updates of
S; G's BatchNorm has the usual eps, here that of DAFL, whose G it otherwise is; it reports the best epoch on the test
set, this recipe the last. For MNIST it takes 40 epochs of 512 images from 100 numbers each, S at 0.01 with decay 1e-4.

Taught in notebook 05.
"""

import copy
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from dfqlib import losses
from dfqlib.generators import Generator
from dfqlib.recipes import base
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training import adversarial
from dfqlib.training.adversarial import AdversarialTraining, Student, StudentLogits, Trainee
from dfqlib.training.settings import BF16, BaseSettings, setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False

MILESTONES = (0.2, 0.4)
"""Shares of the epochs after which learning rates from scratch are divided by ten."""


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Settings of DFAD; the defaults are the authors' for CIFAR-10.

    ``budget="quick"`` deviates so that minutes suffice: 3 epochs of warm-up, 4 of fine-tuning and 8 of distillation,
    each 20 updates of G and five times as many of S, of 48 images; G learns at 3e-4, fine-tuning takes Adam at 1e-4,
    the students' learning rates fall to zero along a cosine, thresholds have no lower bound, and all is computed in
    bfloat16.
    """

    student_steps: int = setting(5, "updates of S for each of G", low=1)
    latent: int = setting(256, "length of the noise vector", low=1)
    distill_epochs: int = setting(500, "epochs of distill")
    warm_up_epochs: int = setting(50, "epochs of G with the tool student")
    epochs: int = setting(40, "epochs of fine-tuning a quantized student")
    iterations: int = setting(50, "updates of G in an epoch", low=1)
    batch: int = setting(256, "images of each update", low=2)
    lr_g: float = setting(1e-3, "learning rate of G, Adam")
    lr_s: float = setting(0.1, base.LR_S)
    lr: float = setting(0.001, "learning rate of fine-tuning")
    step_lr: float = setting(0.1, base.STEP_LR, high=1)
    lower_bound: float = setting(0.3, base.LOWER_BOUND, high=1)
    optimizer: Literal["sgd", "adam"] = setting("sgd", base.OPTIMIZER)
    schedule: Literal["step", "cosine"] = setting(
        "step",
        "of the students' learning rates: step divides them (in distill also G's) by ten after 0.2 and 0.4 of the "
        "epochs, cosine ends at 0",
    )
    bf16: bool = setting(False, BF16)


BUDGETS = {
    "quick": Settings(
        distill_epochs=8, warm_up_epochs=3, epochs=4, iterations=20, batch=48, lr_g=3e-4, lr=1e-4, lower_bound=0.0,
        optimizer="adam", schedule="cosine", bf16=True,
    ),
    "published": Settings(),
}  # fmt: skip


def distill(task: Task, student: nn.Module, settings: Settings) -> Outcome:
    """Algorithm 1: five updates of the student for one of the generator."""
    generator = base.make_generator(task, settings.latent, settings.lr_g)
    if settings.schedule == "step":
        updates = settings.distill_epochs * settings.iterations
        generator = replace(generator, schedule=adversarial.decayed(generator.optimizer, "step", updates, MILESTONES))
    train_from_scratch(task, "distillation", settings.distill_epochs, generator, student, settings)
    return Outcome(student, base.generated_images(generator.network))


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """The generator against a tool student, ranges from its images, then against the quantized student."""
    generator = base.make_generator(task, settings.latent, settings.lr_g)
    train_from_scratch(
        task, "warm-up", settings.warm_up_epochs, generator, adversarial.reinitialized(task.teacher), settings
    )
    images = base.generated_images(generator.network)
    calibrated = calibrated_student(task, spec, images, lower_bound=settings.lower_bound)
    student = copy.deepcopy(calibrated)
    updates = settings.epochs * settings.iterations * settings.student_steps
    trainee = adversarial.quantized(
        student, settings.optimizer, settings.lr, settings.step_lr, settings.schedule, updates
    )
    train(task, "fine-tuning", settings.epochs, generator, trainee, settings)
    return Outcome(student, base.generated_images(generator.network), calibrated)


def train_from_scratch(
    task: Task, phase: str, epochs: int, generator: Trainee[Generator], student: nn.Module, settings: Settings
) -> None:
    """G and a student with random weights, both in place."""
    updates = epochs * settings.iterations * settings.student_steps
    trainee = adversarial.from_scratch(student, settings.lr_s, settings.schedule, updates, milestones=MILESTONES)
    train(task, phase, epochs, generator, trainee, settings)


def train(
    task: Task, phase: str, epochs: int, generator: Trainee[Generator], student: Student, settings: Settings
) -> None:
    """Rounds of one update of G, which ascends the student's loss, and ``student_steps`` of the student."""

    def generator_loss(target: Tensor, student_logits: StudentLogits) -> Tensor:
        return -losses.dfad_loss(student_logits()[0], target)

    AdversarialTraining(
        task, [generator], [student], settings.batch, generator_loss, losses.dfad_loss, settings.student_steps,
        settings.bf16,
    ).run(phase, epochs * settings.iterations)  # fmt: skip
