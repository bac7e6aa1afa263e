"""DFQF (Li et al., ACML 2020): a generator trained against teacher and student, then quantization-aware fine-tuning.

The generator G minimizes ``L_is(40) + 0.1 L_bn + 5 L_adv`` (Eq. 9): images that the teacher T classifies with
certainty, balanced over the classes (Eq. 5), with the statistics that T has stored (Eq. 7), and on which the student S
disagrees with T (Eq. 8). S minimizes ``KL(T(x) || S(x))`` on the same images (Eq. 2).

*Algorithm 1* (``distill``): G and S, a smaller network, in turn, from scratch.

*Algorithm 2* (``quantize``):

1. *Warm-up.* Algorithm 1 with a tool student: the teacher's architecture with new random weights, discarded afterwards.
2. *Calibration.* Each clip threshold A minimizes the squared error on generated images, but is at least 0.3 max|x|, so
   that fine-tuning has room; the step size is A / Q_max (Eq. 10).
3. *Fine-tuning.* S is T quantized; weights and step sizes follow Eq. 2, the step sizes at a tenth of the learning rate
   without momentum and decay (released code; the paper does not say). G is fixed ("FG" in the tables) or continues as
   the adversary of the quantized S.

Where the released code differs: it never implemented the adversary of fine-tuning; the lower bound is 0.5, G's learning
rate 0.005, an epoch 120 batches, fine-tuning batches 128 images; the student is left in training mode, so that its
BatchNorm statistics drift to the generated images (``student_bn="train"``); it reports the best epoch on the test set,
this recipe the last.

Taught in notebook 06, its distillation in notebook 05.
"""

import copy
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from dfqlib import losses
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.generators import Generator
from dfqlib.recipes import base
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training import adversarial
from dfqlib.training.adversarial import AdversarialTraining, Student, StudentLogits, Trainee
from dfqlib.training.settings import BF16, BaseSettings, setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = True


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Settings of DFQF; the defaults are the paper's.

    ``budget="quick"`` deviates so that minutes suffice: 8 epochs of warm-up, 12 of fine-tuning and 16 of distillation,
    each 25 iterations of 64 images; G's learning rate is the released code's, fine-tuning takes Adam at half the rate,
    the students' learning rates fall to zero along a cosine, and all is computed in bfloat16.
    """

    alpha: float = setting(40.0, "weight of the balance within the inception score")
    bn_weight: float = setting(0.1, "weight of the BatchNorm statistics in G's loss")
    adversarial_weight: float = setting(5.0, "weight of the disagreement in G's loss")
    latent: int = setting(1000, "length of the noise vector", low=1)
    warm_up_epochs: int = setting(200, "epochs of G with the tool student")
    epochs: int = setting(40, "epochs of fine-tuning")
    distill_epochs: int = setting(2000, "epochs of distill")
    iterations: int = setting(100, "iterations of an epoch", low=1)
    batch: int = setting(512, "images of each iteration", low=2)
    lr_g: float = setting(0.01, "learning rate of G, Adam")
    lr_s: float = setting(0.1, base.LR_S)
    lr: float = setting(0.001, "learning rate of fine-tuning")
    step_lr: float = setting(0.1, base.STEP_LR, high=1)
    optimizer: Literal["sgd", "adam"] = setting("sgd", base.OPTIMIZER)
    schedule: Literal["step", "cosine"] = setting("step", base.SCHEDULE)
    lower_bound: float = setting(0.3, base.LOWER_BOUND, high=1)
    clip: Literal["max", "mse", "aciq", "kl"] = setting("mse", base.CLIP)
    generator: Literal["fixed", "adversarial"] = setting("fixed", "G in fine-tuning: fixed is FG in the tables")
    student_bn: Literal["eval", "train"] = setting(
        "eval",
        "BatchNorm of the quantized student in fine-tuning: eval keeps the teacher's statistics, train normalizes by "
        "each batch and lets the stored statistics drift; a student from scratch is always in training mode",
    )
    bf16: bool = setting(False, BF16)

    def __post_init__(self) -> None:
        super().__post_init__()
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
    generator = base.make_generator(task, settings.latent, settings.lr_g)
    train_both(task, "warm-up", generator, adversarial.reinitialized(task.teacher), settings.warm_up_epochs, settings)
    images = base.generated_images(generator.network)
    calibrated = calibrated_student(task, spec, images, method=settings.clip, lower_bound=settings.lower_bound)
    student = copy.deepcopy(calibrated)
    fine_tune(task, generator, student, settings)
    return Outcome(student, base.generated_images(generator.network), calibrated)


def distill(task: Task, student: nn.Module, settings: Settings) -> Outcome:
    """Algorithm 1: generator and student in turn."""
    generator = base.make_generator(task, settings.latent, settings.lr_g)
    train_both(task, "distillation", generator, student, settings.distill_epochs, settings)
    return Outcome(student, base.generated_images(generator.network))


def train_both(
    task: Task, phase: str, generator: Trainee[Generator], student: nn.Module, epochs: int, settings: Settings
) -> None:
    """Algorithm 1: G and a student from scratch in turn, both in place."""
    updates = epochs * settings.iterations
    trainee = adversarial.from_scratch(student, settings.lr_s, settings.schedule, updates)
    train(task, phase, generator, trainee, updates, settings)


def fine_tune(task: Task, generator: Trainee[Generator], student: nn.Module, settings: Settings) -> None:
    """Algorithm 2, last step: the calibrated student, in place, with G fixed or as its adversary."""
    updates = settings.epochs * settings.iterations
    student.train(settings.student_bn == "train")
    trainee = adversarial.quantized(
        student, settings.optimizer, settings.lr, settings.step_lr, settings.schedule, updates
    )
    fixed = settings.generator == "fixed"
    train(task, "fine-tuning", generator, trainee, updates, settings, fixed=fixed)


def train(
    task: Task,
    phase: str,
    generator: Trainee[Generator],
    student: Student,
    rounds: int,
    settings: Settings,
    fixed: bool = False,
) -> None:
    """Rounds of an update of G by Eq. 9, unless it is ``fixed``, and one of the student by Eq. 2."""

    def generator_loss(target: Tensor, student_logits: StudentLogits) -> Tensor:
        return losses.dfqf_generator_loss(
            target, student_logits()[0], probe, settings.alpha, settings.bn_weight, settings.adversarial_weight
        )

    with BatchNormProbe(task.teacher) as probe:
        AdversarialTraining(
            task, [generator], [student], settings.batch, None if fixed else generator_loss,
            losses.distillation_loss, bf16=settings.bf16,
        ).run(phase, rounds)  # fmt: skip
