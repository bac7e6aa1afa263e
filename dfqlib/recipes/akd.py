"""AKD (Choi et al., CVPR workshops 2020): minimize the worst-case divergence, with several generators and students.

``min over students, max over generators of mean_{g,s} KL(T(x_g) || S_s(x_g)) - alpha L_psi(x_g)``, x_g = G_g(z): each
student S_s descends its divergence from the teacher T on the images of every generator; each generator G_g ascends
that of every student, held near real images by

``L_psi = sum_l KL(N(mu_hat_l, v_hat_l) || N(mu_l, v_l)) + mean_x H(T(x)) - H(mean_x T(x))``:

the BatchNorm layers' inputs are to have the stored statistics, as Gaussians; each image is to be of one class, and a
batch of all classes.

1. *Warm-up.* The generators alone descend ``alpha L_psi``.
2. *Adversarial distillation.* One update of each generator, then ten of each student, each on new images.

``distill`` trains a smaller student and ``students - 1`` more of its architecture with weights of their own;
``quantize`` trains quantized copies of the teacher. Their ranges are calibrated on warm-up images, and the copies
diverge because each trains on its own random batches. The first student is the result.

No code was released, and the paper's learning rate, 0.1, is that of a student from scratch. A quantized student starts
as the teacher, and 0.1 destroys it. Measured on the digits at W4A4: before the first update a step size of 0.034 has a
gradient of -18, so that at a tenth of 0.1 the first update changes it by five times its value, and a step size is
negative within ten (step sizes are trained as in DFQF, without momentum and decay: those are not the cause); with
``step="fixed"`` the weights are lost instead, 99.2 to 10.0 % in 60 updates. So quantized students learn at DFQF's rate
of fine-tuning, 0.001: 99.2 to 100.0 % after 200 updates, at W3A3 88.4 to 99.4 %. At W2A2 a step size still becomes
negative unless thresholds have DFQF's lower bound, ``lower_bound``; with it, 29.8 to 97.0 %. And the generators must
have been warmed up: on images of new ones a step size becomes negative even at W4A4 and 0.001.

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

from dfqlib import losses
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.generators import AkdGenerator
from dfqlib.recipes import base
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training import adversarial
from dfqlib.training.adversarial import AdversarialTraining, Student, StudentLogits, Trainee
from dfqlib.training.settings import BF16, BaseSettings, setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = True

BYTES_PER_WEIGHT = 16
"""A float32 weight of a generator, its gradient, and Adam's two moments."""


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Settings of AKD; the defaults are the paper's.

    ``budget="quick"`` deviates so that minutes suffice: an epoch of warm-up, 100 updates of the generators, and 3 of
    distillation, each 10 updates of the generators and 100 of the students, all of 64 images; students from scratch
    learn at 0.05 and quantized ones by Adam at 5e-4; the generators' learning rate is constant; thresholds have no
    lower bound; bfloat16.
    """

    generators: int = setting(1, "number of generators, G in the paper", low=1)
    students: int = setting(1, "number of students, S in the paper", low=1)
    alpha: float = setting(0.01, "weight of L_psi in the generators' loss")
    student_steps: int = setting(10, "updates of each student for one of each generator", low=1)
    latent: int = setting(512, "length of the noise vector", low=1)
    warm_up_epochs: int = setting(50, "epochs of the generators alone")
    epochs: int = setting(200, "epochs of adversarial distillation")
    iterations: int = setting(
        400,
        "updates in an epoch, of each generator in warm-up, of each student afterwards; a multiple of student_steps",
        low=1,
    )
    batch: int = setting(256, "images of each generator for an update", low=2)
    lr_g: float = setting(1e-3, "learning rate of the generators, Adam")
    schedule_g: Literal["cosine", "constant"] = setting(
        "cosine", "of the generators' learning rate in distillation; cosine, the paper's, falls to zero"
    )
    lr_s: float = setting(
        0.1,
        "learning rate of students from scratch, SGD with Nesterov's momentum 0.9, to zero along a cosine; the weight "
        "decay of 5e-4 is assumed, that of DAFL and DFAD",
    )
    lr: float = setting(1e-3, "learning rate of quantized students, to zero along a cosine")
    step_lr: float = setting(0.1, base.STEP_LR, high=1)
    lower_bound: float = setting(0.3, base.LOWER_BOUND, high=1)
    optimizer: Literal["sgd", "adam"] = setting("sgd", "of quantized students")
    bf16: bool = setting(False, BF16)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations % self.student_steps:
            raise InputError(
                f"iterations={self.iterations} must be a multiple of student_steps={self.student_steps}, the updates "
                "of the students for each of the generators"
            )
        if self.alpha == 0 < self.warm_up_epochs:
            raise InputError(
                f"alpha=0 leaves the generators nothing to learn in warm_up_epochs={self.warm_up_epochs}; set "
                "alpha above 0, or warm_up_epochs=0"
            )

    @property
    def student_updates(self) -> int:
        """Updates of each student in all."""
        return self.epochs * self.iterations


BUDGETS = {
    "quick": Settings(
        warm_up_epochs=1, epochs=3, iterations=100, batch=64, schedule_g="constant", lr_s=0.05, lr=5e-4,
        lower_bound=0.0, optimizer="adam", bf16=True,
    ),
    "published": Settings(),
}  # fmt: skip


def distill(task: Task, student: nn.Module, settings: Settings) -> Outcome:
    """Warm-up of the generators, then generators and students in turn, the students from scratch."""
    generators = make_generators(task, settings)
    warm_up(task, generators, settings)
    networks = [student, *(adversarial.reinitialized(student) for _ in range(settings.students - 1))]
    students = [
        adversarial.from_scratch(network, settings.lr_s, "cosine", settings.student_updates, nesterov=True)
        for network in networks
    ]
    train(task, "distillation", generators, students, settings)
    return Outcome(student, images_of(generators))


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Warm-up of the generators, ranges from their images, then generators and students in turn."""
    generators = make_generators(task, settings)
    warm_up(task, generators, settings)
    calibrated = calibrated_student(task, spec, images_of(generators), lower_bound=settings.lower_bound)
    rates = (settings.optimizer, settings.lr, settings.step_lr, "cosine", settings.student_updates)
    students = [
        adversarial.quantized(copy.deepcopy(calibrated), *rates, nesterov=True) for _ in range(settings.students)
    ]
    train(task, "fine-tuning", generators, students, settings)
    return Outcome(students[0].network, images_of(generators), calibrated)


def make_generators(task: Task, settings: Settings) -> list[Trainee[AkdGenerator]]:
    """``settings.generators`` new generators, each with its Adam."""
    task.session.reseed("generators")
    _check_memory(task, settings)
    return [
        adversarial.trained_by_adam(task, AkdGenerator(task.image_shape, settings.latent), settings.lr_g)
        for _ in range(settings.generators)
    ]


def warm_up(task: Task, generators: Sequence[Trainee[AkdGenerator]], settings: Settings) -> None:
    """The generators alone, on ``alpha L_psi``."""

    def prior(target: Tensor, _: StudentLogits) -> Tensor:
        return settings.alpha * losses.akd_prior_loss(target, probe)

    with BatchNormProbe(task.teacher) as probe:
        AdversarialTraining(
            task, generators, [], settings.batch, prior, losses.distillation_loss, bf16=settings.bf16
        ).run("warm-up", settings.warm_up_epochs * settings.iterations)


def train(
    task: Task, phase: str, generators: Sequence[Trainee[AkdGenerator]], students: Sequence[Student], settings: Settings
) -> None:
    """Every generator against every student."""

    def generator_loss(target: Tensor, student_logits: StudentLogits) -> Tensor:
        return losses.akd_generator_loss(target, student_logits(), probe, settings.alpha)

    rounds = settings.student_updates // settings.student_steps
    if settings.schedule_g == "cosine":
        generators = [replace(g, schedule=adversarial.decayed(g.optimizer, "cosine", rounds)) for g in generators]
    with BatchNormProbe(task.teacher) as probe:
        AdversarialTraining(
            task, generators, students, settings.batch, generator_loss, losses.distillation_loss,
            settings.student_steps, settings.bf16,
        ).run(phase, rounds)  # fmt: skip


def images_of(generators: Sequence[Trainee[AkdGenerator]]) -> Tensor:
    """``base.IMAGES`` images, in equal shares of all generators as far as possible."""
    shares = [len(rows) for rows in torch.arange(base.IMAGES).tensor_split(len(generators))]
    pairs = zip(generators, shares, strict=True)
    return torch.cat([base.generated_images(generator.network, count) for generator, count in pairs if count])


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
