"""DFQF (Li et al., ACML 2020): a generator trained against teacher and student, then quantization-aware fine-tuning.

The generator G minimizes ``L_is(40) + 0.1 L_bn + 5 L_adv`` (Eq. 9): images the teacher T is sure of, balanced over the
classes (Eq. 5), with the statistics that T has stored (Eq. 7), and on which the student S disagrees with T (Eq. 8).
S minimizes ``KL(T(x) || S(x))`` on the same images (Eq. 2).

*Algorithm 1* (``distill``): G and S, a smaller network, in turn, from scratch.

*Algorithm 2* (``quantize``):

1. *Warm-up.* Algorithm 1 with a tool student: the teacher's architecture with new random weights, thrown away after it.
2. *Calibration.* Each clip threshold A minimizes the squared error on generated images, but is at least 0.3 max|x|, so
   that fine-tuning starts with room; the step is A / Q_max (Eq. 10).
3. *Fine-tuning.* S is T quantized; weights and step sizes follow Eq. 2, the step sizes at a tenth of the learning rate
   without momentum and decay (released code; the paper does not say). G is fixed ("FG" in the tables) or goes on as the
   adversary of the quantized S.

Where the released code differs: it never implemented the adversary of fine-tuning; the lower bound is 0.5, G's learning
rate 0.005, an epoch 120 batches, fine-tuning batches 128 images; the student is left in training mode, so that its
BatchNorm statistics drift to the generated images (``student_bn="train"``); the best epoch on the test set is reported,
here the last.

Taught in notebook 06, its distillation in notebook 05.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from dfqlib import losses, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.generators import UnconditionalGenerator
from dfqlib.recipes.base import Outcome, check_settings
from dfqlib.spec import QuantSpec
from dfqlib.training.adversarial import (
    Answers,
    Player,
    Rules,
    from_scratch,
    play,
    quantized,
    reinitialized,
    trained_by_adam,
)
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = True

IMAGES = 256
"""How many images the ranges are set from, and how many the report shows."""
MILESTONES = (0.4, 0.8)
"""Where the learning rate of a student trained from scratch is divided by ten, as shares of its epochs."""


@dataclass(frozen=True)
class Settings:
    """Settings of DFQF; the defaults are the paper's.

    ``budget="quick"`` deviates so that minutes suffice: 8 epochs of warm-up, 12 of fine-tuning and 16 of distillation,
    each 25 iterations of 64 images; G's learning rate is the released code's, fine-tuning takes Adam at half the rate,
    the students' rates fall to zero along a cosine, and all is computed in bfloat16.

    Attributes:
        alpha: weight of the balance within the inception score.
        bn_weight: of the BatchNorm statistics in G's loss.
        adversarial_weight: of the disagreement in G's loss.
        latent: length of the noise vector.
        warm_up_epochs: of G with the tool student, ``iterations`` batches of ``batch`` images each.
        epochs: of fine-tuning.
        distill_epochs: of ``distill``.
        lr_g: learning rate of G, Adam.
        lr_s: learning rate of a student trained from scratch, SGD with momentum 0.9 and decay 5e-4, divided by ten
            after 0.4 and 0.8 of its epochs.
        lr: learning rate of fine-tuning.
        step_lr: learning rate of the steps as a share of ``lr``.
        optimizer: of fine-tuning, "sgd" (momentum 0.9, decay 5e-4) or "adam".
        schedule: "step", the paper's, or "cosine", with which all rates fall to zero.
        lower_bound: smallest clip threshold as a share of max|x|.
        clip: how thresholds are found above it, one of ``clipping.METHODS``.
        generator: in fine-tuning, "fixed" (FG) or "adversarial".
        student_bn: BatchNorm of the quantized student in fine-tuning: "eval" keeps the teacher's statistics, "train"
            uses each batch's and lets the stored ones drift. A student from scratch is always in training mode.
        bf16: compute in bfloat16 where the processor has it; the result is always evaluated in float32.
    """

    alpha: float = 40.0
    bn_weight: float = 0.1
    adversarial_weight: float = 5.0
    latent: int = 1000
    warm_up_epochs: int = 200
    epochs: int = 40
    distill_epochs: int = 2000
    iterations: int = 100
    batch: int = 512
    lr_g: float = 0.01
    lr_s: float = 0.1
    lr: float = 0.001
    step_lr: float = 0.1
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["step", "cosine"] = "step"
    lower_bound: float = 0.3
    clip: Literal["max", "mse", "aciq", "kl"] = "mse"
    generator: Literal["fixed", "adversarial"] = "fixed"
    student_bn: Literal["eval", "train"] = "eval"
    bf16: bool = False

    def __post_init__(self) -> None:
        check_settings(
            self, alpha=(0, math.inf), bn_weight=(0, math.inf), adversarial_weight=(0, math.inf), latent=(1, math.inf),
            warm_up_epochs=(0, math.inf), epochs=(0, math.inf), distill_epochs=(0, math.inf), batch=(2, math.inf),
            iterations=(1, math.inf), lr_g=(0, math.inf), lr_s=(0, math.inf), lr=(0, math.inf), step_lr=(0, 1),
            lower_bound=(0, 1),
        )  # fmt: skip
        if self.generator == "adversarial" and self.adversarial_weight == 0:
            raise InputError('generator="adversarial" needs adversarial_weight above 0; or take generator="fixed"')


BUDGETS = {
    "quick": Settings(
        warm_up_epochs=8, epochs=12, distill_epochs=16, iterations=25, batch=64, lr_g=0.005, lr=5e-4, optimizer="adam",
        schedule="cosine", bf16=True,
    ),
    "published": Settings(),
}  # fmt: skip


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Algorithm 2: warm-up with a tool student, calibration, fine-tuning."""
    players = Players(task, settings)
    players.train_both("warm-up", reinitialized(task.teacher), settings.warm_up_epochs)
    images = players.images(IMAGES)
    calibrated = calibrated_student(task, spec, images, method=settings.clip, lower_bound=settings.lower_bound)
    student = copy.deepcopy(calibrated)
    players.fine_tune(student)
    return Outcome(student, players.images(IMAGES), calibrated)


def distill(task: Task, student: nn.Module, settings: Settings) -> Outcome:
    """Algorithm 1: generator and student in turn."""
    players = Players(task, settings)
    players.train_both("distillation", student, settings.distill_epochs)
    return Outcome(student, players.images(IMAGES))


class Players:
    """Generator G against teacher T, and the student S of the phase: every phase plays the same two moves.

    Attributes:
        generator: G.
        player: G and the Adam that trains it through all phases.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        task.session.reseed("generator")
        self.task, self.settings = task, settings
        self.generator = UnconditionalGenerator(task.image_shape, settings.latent)
        self.player = trained_by_adam(task, self.generator, settings.lr_g)

    def train_both(self, phase: str, student: nn.Module, epochs: int) -> None:
        """Algorithm 1: G and a student from scratch in turn, both in place."""
        settings, steps = self.settings, epochs * self.settings.iterations
        opponent = from_scratch(student, settings.lr_s, settings.schedule, steps, MILESTONES)
        self._play(phase, steps, opponent, adversarial=True)

    def fine_tune(self, student: nn.Module) -> None:
        """Algorithm 2, last step: the calibrated student, in place, with G fixed or as its adversary."""
        settings, steps = self.settings, self.settings.epochs * self.settings.iterations
        student.train(settings.student_bn == "train")
        opponent = quantized(student, settings.optimizer, settings.lr, settings.step_lr, settings.schedule, steps)
        self._play("fine-tuning", steps, opponent, settings.generator == "adversarial")

    def _play(self, phase: str, steps: int, opponent: Player[nn.Module], adversarial: bool) -> None:
        settings = self.settings

        def generator_loss(target: Tensor, answers: Answers) -> Tensor:
            return losses.dfqf_generator_loss(
                target, answers()[0], probe, settings.alpha, settings.bn_weight, settings.adversarial_weight
            )

        moves = generator_loss if adversarial else None
        rules = Rules(settings.batch, moves, losses.distillation_loss, bf16=settings.bf16)
        with BatchNormProbe(self.task.teacher) as probe:
            play(self.task, phase, steps, [self.player], [opponent], rules)

    def images(self, count: int) -> Tensor:
        """Images from G in eval mode."""
        return synthesis.from_generator(self.generator, count)[0]
