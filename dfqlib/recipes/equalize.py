"""Equalize: quantization from the weights alone (Nagel et al., Data-Free Quantization through Weight Equalization and
Bias Correction, ICCV 2019). No training, no images.

1. *Fold* BatchNorm into the weights.
2. *Equalize* the channels of layers that a ReLU connects: ``s = sqrt(r1 r2) / r2`` (Eq. 11), until nothing moves.
3. *Absorb* high biases, ``c = max(0, beta - 3 gamma)``, into the next layer (section 4.1.3).
4. *Quantize*: weight ranges from the weights, activation ranges ``beta -+ 6 gamma`` from the BatchNorm statistics.
5. *Correct* the biases by ``epsilon E[x]``, E[x] the mean of a clipped normal variable (section 4.2, appendix C).

Instead of rounding to nearest, step 4 can end in AdaRound (Nagel et al., ICML 2020) on synthetic images.

What the paper leaves open. Sums of residual branches, which no BatchNorm layer follows: see ``moments``. Absorption
across zero padding changes the border of the output: done only on ``absorb="all"``. ReLU6, which the paper replaces by
ReLU: kept unless ``relu6="replace"``, and not equalized across. Tensors that no BatchNorm statistics tell about (the
network's input, what follows max pooling, all of a network without BatchNorm): range and mean from Gaussian images.

Taught in notebooks 02 and 09.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dfqlib.network import folding
from dfqlib.posttraining import correction, equalization, moments, rounding
from dfqlib.recipes import base, express
from dfqlib.recipes.base import Outcome, check_settings
from dfqlib.spec import QuantSpec
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False


@dataclass(frozen=True)
class Settings:
    """Settings of equalize. "published" is the paper, made for 8 bits; "quick" chooses ranges for fewer.

    Attributes:
        iterations: most passes of equalization over all pairs of layers; 0 for none.
        absorb: high biases: "unpadded" where it does not show, "all" as the paper writes it, or "none".
        relu6: "keep", or "replace" each by a ReLU, which changes the network a little and lets it be equalized.
        clip: how weight ranges are found, one of ``clipping.METHODS``; the paper takes the largest magnitude.
        ranges: of activations, from BatchNorm "statistics" or by ``clip`` from the "images".
        deviations: a range reaches as many gamma from beta; the paper's 6.
        correction: E[x] of the bias correction from BatchNorm "statistics" or the "images", or "none". Not done
            after AdaRound, whose reconstruction has taken the mean error away with the rest.
        bias_bits: width of biases, 16 or 32.
        rounding: "nearest" or "adaround", which wants ``synthesis_steps``: noise tells it little about the network.
        rounding_steps: AdaRound's steps per layer; 10,000 in its paper.
        images: how many there are, to measure what statistics do not tell, for AdaRound and for export.
        synthesis_steps: 0 leaves them Gaussian noise; more optimize them to the BatchNorm statistics as express does.
    """

    iterations: int = 20
    absorb: Literal["unpadded", "all", "none"] = "unpadded"
    relu6: Literal["keep", "replace"] = "keep"
    clip: Literal["max", "mse", "aciq", "kl"] = "mse"
    ranges: Literal["statistics", "images"] = "statistics"
    deviations: float = 3.0
    correction: Literal["statistics", "images", "none"] = "statistics"
    bias_bits: Literal[16, 32] = 32
    rounding: Literal["nearest", "adaround"] = "nearest"
    rounding_steps: int = 1000
    images: int = 64
    synthesis_steps: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self, iterations=(0, math.inf), deviations=(0.1, math.inf), rounding_steps=(1, math.inf),
            images=(2, math.inf), synthesis_steps=(0, math.inf),
        )  # fmt: skip


BUDGETS = {
    "quick": Settings(),
    "published": Settings(absorb="all", relu6="replace", clip="max", deviations=6.0, rounding_steps=10_000),
}


def check(spec: QuantSpec, settings: Settings) -> None:
    """Refuse widths that the rounding cannot work with, before any work."""
    if settings.rounding == "adaround":
        rounding.require_steps(spec)


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Fold, equalize, absorb; quantize; correct or reconstruct."""
    images = example_images(task, settings)
    folded = folding.fold(task.teacher, settings.relu6)
    equalization.equalize(folded, settings.iterations)
    if settings.absorb != "none":
        equalization.absorb(folded, padded=settings.absorb == "all")
    equalized = dataclasses.replace(task, teacher=folded.network)
    student: Any = calibrated_student(equalized, spec, images, method=settings.clip)
    if settings.ranges == "statistics":
        moments.set_ranges(student, folded.statistics, settings.deviations)
    if settings.rounding == "adaround":
        rounding.adaround(student, folded.network, images, steps=settings.rounding_steps, session=task.session)
    elif settings.correction != "none":
        correction.correct_biases(student, folded.network, input_means(folded, images, settings))
    correction.round_biases(student, settings.bias_bits)
    student.meta["changes"] = folding.changes(student, task.teacher, settings.relu6)
    return Outcome(student, images, calibrated=student)


def example_images(task: Task, settings: Settings) -> Tensor:
    """Gaussian noise, or noise made to suit the BatchNorm statistics, (images, C, H, W)."""
    if settings.synthesis_steps:
        base.require_batchnorm(task.teacher, 'equalize" with "synthesis_steps')
        wanted = express.Settings(images=settings.images, synthesis_steps=settings.synthesis_steps)
        return express.synthesize(task, wanted)
    task.session.reseed("noise")
    return torch.randn(settings.images, *task.image_shape).to(task.device)


def input_means(folded: folding.Folded, images: Tensor, settings: Settings) -> dict[str, Tensor]:
    """E[x] for each layer: measured on the images, and taken from the statistics wherever they tell and are wanted."""
    measured = correction.measured_inputs(folded.network, images)
    known = correction.expected_inputs(folded.network, folded.statistics)
    return measured if settings.correction == "images" else measured | known
