"""AKD (Choi et al., CVPR workshops 2020): the smallest largest distance, with several generators and students.

``min over students, max over generators of mean_{g,s} KL(T(x_g) || S_s(x_g)) - alpha L_psi(x_g)``, x_g = G_g(z): each
student S_s descends its divergence from the teacher T on the images of every generator; each generator G_g ascends
that of every student, held near real images by

``L_psi = sum_l KL(N(mu_hat_l, v_hat_l) || N(mu_l, v_l)) + mean_x H(T(x)) - H(mean_x T(x))``:

the BatchNorm layers' inputs are to have the stored statistics, as Gaussians; each image is to be of one class, and a
batch of all classes.

1. *Warm-up.* The generators alone descend ``alpha L_psi``.
2. *Adversarial distillation.* One move of each generator, then ten of each student, each on new images.

``distill`` trains a smaller student and ``students - 1`` more of its architecture with weights of their own;
``quantize`` trains quantized copies of the teacher, their ranges set from the images of the warm-up, which part
because each draws images of its own. The first student is the result.

No code was released, and the paper's rate, 0.1, is that of a student from scratch. A quantized student starts as the
teacher, and 0.1 destroys it. Measured on the digits at W4A4: before the first move a step of 0.034 has a gradient of
-18, so that at a tenth of 0.1 the first move is five times the step, and a step is negative within ten (steps are
trained as in DFQF, without momentum and decay: those are not the cause); with ``step="fixed"`` the weights are lost
instead, 99.2 to 10.0 % in 60 moves. So quantized students learn at DFQF's rate of fine-tuning, 0.001: 99.2 to 100.0 %
after 200 moves, at W3A3 88.4 to 99.4 %. At W2A2 a step turns negative even so unless thresholds have DFQF's lower
bound, ``lower_bound``; with it, 29.8 to 97.0 %. And the generators must have been warmed up: on images of new ones a
step turns negative at W4A4 and 0.001 too.

Taught in notebook 08.
"""

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dfqlib import losses, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.generators import AkdGenerator
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

NEEDS_BATCHNORM = True

IMAGES = 256
"""How many images the ranges are set from, and how many the report shows."""
BYTES_PER_WEIGHT = 16
"""A float32 weight of a generator, its gradient, and Adam's two moments."""


@dataclass(frozen=True)
class Settings:
    """Settings of AKD; the defaults are the paper's.

    ``budget="quick"`` deviates so that minutes suffice: an epoch of warm-up, 100 moves of the
    generators, and 3 of distillation, each 10 moves of the generators and 100 of the students, all of 64 images;
    students from scratch learn at 0.05 and quantized ones by Adam at 5e-4; the generators' rate is constant; thresholds
    have no lower bound; bfloat16.

    Attributes:
        generators: G, how many; students: S, how many.
        alpha: weight of L_psi in the generators' loss.
        student_steps: moves of each student for one of each generator.
        latent: length of the noise vector.
        warm_up_epochs: of the generators alone, ``iterations`` moves each.
        epochs: of adversarial distillation, ``iterations`` moves of each student.
        iterations: see above; a multiple of ``student_steps``.
        batch: images of each generator for a move.
        lr_g: learning rate of the generators, Adam.
        schedule_g: of that rate once students compete: to zero along a "cosine", the paper's, or "constant".
        lr_s: learning rate of students from scratch, SGD with Nesterov's momentum 0.9, to zero along a cosine. Their
            decay of 5e-4 is an assumption: that of DAFL and DFAD.
        lr: learning rate of quantized students, to zero along a cosine.
        step_lr: learning rate of the steps as a share of ``lr``.
        lower_bound: smallest clip threshold of quantized students as a share of max|x|.
        optimizer: of quantized students, "sgd" or "adam".
        bf16: compute in bfloat16 where the processor has it; the result is always evaluated in float32.
    """

    generators: int = 1
    students: int = 1
    alpha: float = 0.01
    student_steps: int = 10
    latent: int = 512
    warm_up_epochs: int = 50
    epochs: int = 200
    iterations: int = 400
    batch: int = 256
    lr_g: float = 1e-3
    schedule_g: Literal["cosine", "constant"] = "cosine"
    lr_s: float = 0.1
    lr: float = 1e-3
    step_lr: float = 0.1
    lower_bound: float = 0.3
    optimizer: Literal["sgd", "adam"] = "sgd"
    bf16: bool = False

    def __post_init__(self) -> None:
        check_settings(
            self, generators=(1, math.inf), students=(1, math.inf), alpha=(0, math.inf), student_steps=(1, math.inf),
            latent=(1, math.inf), warm_up_epochs=(0, math.inf), epochs=(0, math.inf), iterations=(1, math.inf),
            batch=(2, math.inf), lr_g=(0, math.inf), lr_s=(0, math.inf), lr=(0, math.inf), step_lr=(0, 1),
            lower_bound=(0, 1),
        )  # fmt: skip
        if self.iterations % self.student_steps:
            raise InputError(
                f"iterations={self.iterations} must be a multiple of student_steps={self.student_steps}, the moves of "
                "the students for each of the generators"
            )
        if self.alpha == 0 < self.warm_up_epochs:
            raise InputError(
                f"alpha=0 leaves the generators nothing to learn in warm_up_epochs={self.warm_up_epochs}; set "
                "alpha above 0, or warm_up_epochs=0"
            )

    @property
    def student_moves(self) -> int:
        """Of each student, in all."""
        return self.epochs * self.iterations


BUDGETS = {
    "quick": Settings(
        warm_up_epochs=1, epochs=3, iterations=100, batch=64, schedule_g="constant", lr_s=0.05, lr=5e-4,
        lower_bound=0.0, optimizer="adam", bf16=True,
    ),
    "published": Settings(),
}  # fmt: skip


def distill(task: Task, student: nn.Module, settings: Settings) -> Outcome:
    """Warm-up of the generators, then both sides in turn, the students from scratch."""
    generators = make_generators(task, settings)
    warm_up(task, generators, settings)
    networks = [student, *(reinitialized(student) for _ in range(settings.students - 1))]
    students = [
        from_scratch(network, settings.lr_s, "cosine", settings.student_moves, (), nesterov=True)
        for network in networks
    ]
    compete(task, "distillation", generators, students, settings)
    return Outcome(student, images_of(generators))


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Warm-up of the generators, ranges from their images, then both sides in turn."""
    generators = make_generators(task, settings)
    warm_up(task, generators, settings)
    calibrated = calibrated_student(task, spec, images_of(generators), lower_bound=settings.lower_bound)
    students = [
        quantized(
            copy.deepcopy(calibrated), settings.optimizer, settings.lr, settings.step_lr, "cosine",
            settings.student_moves, nesterov=True,
        )
        for _ in range(settings.students)
    ]  # fmt: skip
    compete(task, "fine-tuning", generators, students, settings)
    return Outcome(students[0].network, images_of(generators), calibrated)


def make_generators(task: Task, settings: Settings) -> list[Player[AkdGenerator]]:
    """``settings.generators`` new generators, each with its Adam."""
    task.session.reseed("generators")
    _check_memory(task, settings)
    return [
        trained_by_adam(task, AkdGenerator(task.image_shape, settings.latent), settings.lr_g)
        for _ in range(settings.generators)
    ]


def warm_up(task: Task, generators: Sequence[Player[AkdGenerator]], settings: Settings) -> None:
    """The generators alone, on ``alpha L_psi``."""

    def prior(target: Tensor, _: Answers) -> Tensor:
        return settings.alpha * losses.akd_prior_loss(target, probe)

    rules = Rules(settings.batch, prior, losses.distillation_loss, bf16=settings.bf16)
    with BatchNormProbe(task.teacher) as probe:
        play(task, "warm-up", settings.warm_up_epochs * settings.iterations, generators, [], rules)


def compete(
    task: Task, phase: str, generators: Sequence[Player[AkdGenerator]], students: Sequence[Player[nn.Module]],
    settings: Settings,
) -> None:  # fmt: skip
    """Every generator against every student."""

    def generator_loss(target: Tensor, answers: Answers) -> Tensor:
        return losses.akd_generator_loss(target, answers(), probe, settings.alpha)

    rules = Rules(settings.batch, generator_loss, losses.distillation_loss, settings.student_steps, settings.bf16)
    rounds = settings.student_moves // settings.student_steps
    if settings.schedule_g == "cosine":
        generators = [replace(g, schedule=decayed(g.optimizer, "cosine", rounds, ())) for g in generators]
    with BatchNormProbe(task.teacher) as probe:
        play(task, phase, rounds, generators, students, rules)


def images_of(generators: Sequence[Player[AkdGenerator]]) -> Tensor:
    """``IMAGES`` images, as equal shares of every generator's as there are."""
    shares = torch.arange(IMAGES).tensor_split(len(generators))
    pairs = zip(generators, shares, strict=True)
    return torch.cat([synthesis.from_generator(g.network, len(share))[0] for g, share in pairs if len(share)])


def _check_memory(task: Task, settings: Settings) -> None:
    with torch.device("meta"):
        weights = sum(p.numel() for p in AkdGenerator(task.image_shape, settings.latent).parameters())
    needed, present = settings.generators * weights * BYTES_PER_WEIGHT, _memory(task.device)
    if needed > present:
        raise InputError(
            f"generators={settings.generators} need {needed / 2**30:.1f} GiB to be trained and {task.device} has "
            f"{present / 2**30:.1f}; take at most {int(present // (weights * BYTES_PER_WEIGHT))}"
        )


def _memory(device: torch.device) -> float:
    """Bytes that the device has; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf
