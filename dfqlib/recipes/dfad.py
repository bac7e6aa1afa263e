"""DFAD (Fang et al., 2019): a generator that only looks for what the student has not learned yet.

The student S descends ``mean|T(x) - S(x)|`` over the logits on a generator's images x = G(z), and G ascends it: hard
samples and nothing else, no BatchNorm, no labels. Five moves of S, each on new images, follow one of G.

- ``distill``: S is a smaller network, from scratch.
- ``quantize``: G is warmed up against a tool student, the teacher's architecture with new random weights; the ranges
  of the quantized S come from G's images, and then both go on in turn. The paper does not quantize.

Where the released code differs: for segmentation G ascends ``log(1 + mean|T - S|)``; a round begins with the moves of
S; G's BatchNorm has the usual eps, here that of DAFL, whose G it otherwise is; the best epoch on the test set is
reported, here the last. For MNIST it takes 40 epochs of 512 images from 100 numbers each, S at 0.01 with decay 1e-4.

Taught in notebook 05.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from dfqlib import losses, synthesis
from dfqlib.generators import UnconditionalGenerator
from dfqlib.recipes.base import Outcome, check_settings
from dfqlib.spec import QuantSpec
from dfqlib.training.adversarial import (
    Answers,
    Player,
    Rules,
    decayed,
    from_scratch,
    play,
    quantized,
    reinitialized,
    trained_by_adam,
)
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False

IMAGES = 256
"""How many images the ranges are set from, and how many the report shows."""
MILESTONES = (0.2, 0.4)
"""Where the learning rate of a student trained from scratch is divided by ten, as shares of its epochs."""


@dataclass(frozen=True)
class Settings:
    """Settings of DFAD; the defaults are the authors' for CIFAR-10.

    ``budget="quick"`` deviates so that minutes suffice: 3 epochs of warm-up, 4 of fine-tuning and 8 of distillation,
    each 20 moves of G and five times as many of S, of 48 images; G learns at 3e-4, fine-tuning takes Adam at 1e-4, the
    students' rates fall to zero along a cosine, thresholds have no lower bound, and all is computed in bfloat16.

    Attributes:
        student_steps: moves of S for each of G.
        latent: length of the noise vector.
        distill_epochs: of ``distill``, ``iterations`` moves of G each.
        warm_up_epochs: of G with the tool student.
        epochs: of fine-tuning a quantized student.
        batch: images of each move.
        lr_g: learning rate of G, Adam.
        lr_s: learning rate of a student from scratch, SGD with momentum 0.9 and decay 5e-4, divided by ten after 0.2
            and 0.4 of its epochs.
        lr: learning rate of fine-tuning.
        step_lr: learning rate of the steps as a share of ``lr``.
        lower_bound: smallest clip threshold of the quantized student as a share of max|x|, as in DFQF: room for steps
            that are learned.
        optimizer: of fine-tuning, "sgd" or "adam".
        schedule: of the students' rates: "step", the authors', with which G's rate in ``distill`` falls as S's does, or
            "cosine".
        bf16: compute in bfloat16 where the processor has it; the result is always evaluated in float32.
    """

    student_steps: int = 5
    latent: int = 256
    distill_epochs: int = 500
    warm_up_epochs: int = 50
    epochs: int = 40
    iterations: int = 50
    batch: int = 256
    lr_g: float = 1e-3
    lr_s: float = 0.1
    lr: float = 0.001
    step_lr: float = 0.1
    lower_bound: float = 0.3
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["step", "cosine"] = "step"
    bf16: bool = False

    def __post_init__(self) -> None:
        check_settings(
            self, student_steps=(1, math.inf), latent=(1, math.inf), distill_epochs=(0, math.inf),
            warm_up_epochs=(0, math.inf), epochs=(0, math.inf), iterations=(1, math.inf), batch=(2, math.inf),
            lr_g=(0, math.inf), lr_s=(0, math.inf), lr=(0, math.inf), step_lr=(0, 1), lower_bound=(0, 1),
        )  # fmt: skip


BUDGETS = {
    "quick": Settings(
        distill_epochs=8, warm_up_epochs=3, epochs=4, iterations=20, batch=48, lr_g=3e-4, lr=1e-4, lower_bound=0.0,
        optimizer="adam", schedule="cosine", bf16=True,
    ),
    "published": Settings(),
}  # fmt: skip


def distill(task: Task, student: nn.Module, settings: Settings) -> Outcome:
    """Algorithm 1: five moves of the student for one of the generator."""
    generator = make_generator(task, settings)
    if settings.schedule == "step":
        moves = settings.distill_epochs * settings.iterations
        generator = replace(generator, schedule=decayed(generator.optimizer, "step", moves, MILESTONES))
    train_from_scratch(task, "distillation", settings.distill_epochs, generator, student, settings)
    return Outcome(student, synthesis.from_generator(generator.network, IMAGES)[0])


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """The generator against a tool student, ranges from its images, then against the quantized student."""
    generator = make_generator(task, settings)
    train_from_scratch(task, "warm-up", settings.warm_up_epochs, generator, reinitialized(task.teacher), settings)
    images = synthesis.from_generator(generator.network, IMAGES)[0]
    calibrated = calibrated_student(task, spec, images, lower_bound=settings.lower_bound)
    student = copy.deepcopy(calibrated)
    steps = settings.epochs * settings.iterations * settings.student_steps
    opponent = quantized(student, settings.optimizer, settings.lr, settings.step_lr, settings.schedule, steps)
    compete(task, "fine-tuning", settings.epochs, generator, opponent, settings)
    return Outcome(student, synthesis.from_generator(generator.network, IMAGES)[0], calibrated)


def make_generator(task: Task, settings: Settings) -> Player[UnconditionalGenerator]:
    """A new G and its Adam."""
    task.session.reseed("generator")
    return trained_by_adam(task, UnconditionalGenerator(task.image_shape, settings.latent), settings.lr_g)


def train_from_scratch(
    task: Task, phase: str, epochs: int, generator: Player[UnconditionalGenerator], student: nn.Module,
    settings: Settings,
) -> None:  # fmt: skip
    """G and a student with random weights, both in place."""
    steps = epochs * settings.iterations * settings.student_steps
    opponent = from_scratch(student, settings.lr_s, settings.schedule, steps, MILESTONES)
    compete(task, phase, epochs, generator, opponent, settings)


def compete(
    task: Task, phase: str, epochs: int, generator: Player[UnconditionalGenerator], student: Player[nn.Module],
    settings: Settings,
) -> None:  # fmt: skip
    """G ascends what the student descends, one move to ``student_steps``."""

    def generator_loss(target: Tensor, answers: Answers) -> Tensor:
        return -losses.dfad_loss(answers()[0], target)

    rules = Rules(settings.batch, generator_loss, losses.dfad_loss, settings.student_steps, settings.bf16)
    play(task, phase, epochs * settings.iterations, [generator], [student], rules)
