"""DSG (Zhang et al., CVPR 2021; Qin et al., journal version): images kept diverse, for any calibration.

Images that all match the stored statistics exactly are all alike. DSG makes them differ in two ways:

1. *Slack.* A statistic may differ from the stored one by a margin at no cost, ``sum_l ||max(|mu_hat - mu| - delta_l,
   0)||^2 + ||max(|sigma_hat - sigma| - gamma_l, 0)||^2``. The margins are the 0.9 percentile of the same differences on
   1,024 Gaussian inputs.
2. *Layerwise enhancement.* With as many images as there are BatchNorm layers, N, image n counts layer n twice:
   ``(1/N) 1^T (I + 1 1^T) L``, with L the slack losses of each image alone in each layer.

The images then serve calibration alone (as in ZeroQ and the CVPR paper), AdaRound, or fine-tuning.

Where the released code differs: for fine-tuning it takes ``max(|gap - delta|, 0)``, where the absolute value cancels
the slack, so that even a gap of zero costs; this recipe has the paper's form throughout. Fine-tuning is express's, not
the generator of the journal version.

Taught in notebooks 03 and 09.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dfqlib import batchnorm, losses, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.losses import SlackMargin
from dfqlib.network import graph
from dfqlib.posttraining import rounding
from dfqlib.recipes import base
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training import distillation
from dfqlib.training.settings import setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = True


@dataclass(frozen=True)
class Settings(distillation.Tuning):
    """Settings of DSG; synthesis is ZeroQ's, as in the paper, and fine-tuning express's.

    ``budget="quick"`` deviates so that minutes suffice: 300 iterations on the pixels of 192 images, 300 of fine-tuning
    or 200 for the rounding of each layer, all but the rounding in bfloat16.
    """

    images: int = setting(1024, "number of synthetic images", low=1)
    slack: bool = setting(True, "False makes every margin zero")
    enhancement: bool = setting(True, "False matches the statistics of all images of a batch together")
    epsilon: float = setting(0.9, "quantile of the Gaussian inputs' gaps that is the margin", high=1)
    gaussian_images: int = setting(1024, "number of Gaussian inputs", low=1)
    iterations: int = setting(500, "iterations of Adam on the pixels of each batch")
    synthesis_lr: float = setting(0.5, "their learning rate")
    patience: int = setting(100, "iterations without a lower loss after which synthesis_lr is divided by ten")
    synthesis_batch: int = setting(
        256, "images optimized together, at most; with enhancement, a multiple of the number of BatchNorm layers", low=1
    )
    then: Literal["calibrate", "adaround", "fine-tune"] = setting(
        "fine-tune", "only set the ranges, choose each weight's rounding too, or fine-tune"
    )
    rounding_steps: int = setting(10_000, "iterations of AdaRound for each layer; its paper's 10,000", low=1)
    clip: Literal["max", "mse", "aciq", "kl"] = setting("mse", base.CLIP)
    steps: int = 4000
    bf16: bool = False


BUDGETS = {
    "quick": Settings(images=192, iterations=300, rounding_steps=200, steps=300, bf16=True),
    "published": Settings(),
}


def check(spec: QuantSpec, settings: Settings) -> None:
    """Refuse a QuantSpec that AdaRound cannot work with, before any image is made."""
    if settings.then == "adaround":
        rounding.require_steps(spec)


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Margins, images, ranges, and what comes then."""
    _counts(settings, len(batchnorm.layers(task.teacher)))  # refuses before any work what cannot end well
    images = diverse_images(task, settings, margins(task, settings))
    calibrated = calibrated_student(task, spec, images, method=settings.clip)
    if settings.then == "calibrate":
        return Outcome(calibrated, images, calibrated)
    student: Any = copy.deepcopy(calibrated)
    if settings.then == "adaround":
        rounding.adaround(
            student, graph.trace(task.teacher)[0], images, steps=settings.rounding_steps, session=task.session
        )
    else:
        distillation.fine_tune(task, student, images, settings, distillation.peak_lr(settings.lr, spec))
    return Outcome(student, images, calibrated)


def margins(task: Task, settings: Settings) -> list[SlackMargin]:
    """One for each BatchNorm layer; all zero without slack."""
    task.session.reseed("margins")
    measured = losses.slack_margins(task.teacher, task.image_shape, settings.epsilon, settings.gaussian_images)
    return measured if settings.slack else [SlackMargin(0.0, 0.0)] * len(measured)


def diverse_images(task: Task, settings: Settings, margins: list[SlackMargin]) -> Tensor:
    """Images whose statistics are within the margins, shape (images, C, H, W)."""
    count, batch = _counts(settings, len(margins))
    term = losses.layerwise_enhancement if settings.enhancement else losses.slack_bn_loss

    def objective(_: Tensor, __: Tensor, probe: BatchNormProbe, ___: Tensor) -> dict[str, Tensor]:
        return {"loss": term(probe, margins)}

    unused_labels = synthesis.balanced_labels(count, task.classes, task.device)
    made = synthesis.from_noise(
        task.teacher, unused_labels, task.image_shape, objective,
        synthesis.adam_on_plateaus(settings.synthesis_lr, settings.patience), settings.iterations, task.session,
        batch=batch, bf16=settings.bf16,
    )  # fmt: skip
    return made[: settings.images]


def _counts(settings: Settings, layers: int) -> tuple[int, int]:
    """How many images to make and how many at once: with enhancement, multiples of the number of layers."""
    if not settings.enhancement:
        return settings.images, settings.synthesis_batch
    for name in ("images", "synthesis_batch"):
        if getattr(settings, name) < layers:
            raise InputError(
                f"{name}={getattr(settings, name)} is less than the {layers} BatchNorm layers of this network, and "
                f"enhancement=True needs an image for each; take at least {layers}, or enhancement=False"
            )
    return math.ceil(settings.images / layers) * layers, settings.synthesis_batch // layers * layers
