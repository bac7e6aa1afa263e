"""Equalize: quantization from the weights alone (Nagel et al., Data-Free Quantization through Weight Equalization and
Bias Correction, ICCV 2019). No training, no images.

1. *Fold* BatchNorm into the weights.
2. *Equalize* the channels of layers that a ReLU connects: ``s = sqrt(r1 r2) / r2`` (Eq. 11), until convergence.
3. *Absorb* high biases, ``c = max(0, beta - 3 gamma)``, into the next layer (section 4.1.3).
4. *Quantize*: weight ranges from the weights, activation ranges ``beta -+ 6 gamma`` from the BatchNorm statistics.
5. *Correct* the biases by ``epsilon E[x]``, E[x] the mean of a clipped normal variable (section 4.2, appendix C).

Instead of rounding to nearest, step 4 can end in AdaRound (Nagel et al., ICML 2020) on synthetic images.

What the paper leaves open. Sums of residual branches, which no BatchNorm layer follows: see ``moments``. Absorption
across zero padding changes the border of the output: done only on ``absorb="all"``. ReLU6, which the paper replaces by
ReLU: kept unless ``relu6="replace"``, and not equalized across. Tensors without BatchNorm statistics (the
network's input, what follows max pooling, all of a network without BatchNorm): range and mean from Gaussian images.

Taught in notebooks 02 and 09.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dfqlib.network import folding
from dfqlib.posttraining import correction, equalization, moments, rounding
from dfqlib.recipes import base, express
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training.settings import BaseSettings, setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Settings of equalize. "published" is the paper, made for 8 bits; "quick" chooses ranges for fewer."""

    iterations: int = setting(20, "most passes of equalization over all pairs of layers; 0 for none")
    absorb: Literal["unpadded", "all", "none"] = setting(
        "unpadded", "high biases only where padding hides no error, all as the paper writes it, or none"
    )
    relu6: Literal["keep", "replace"] = setting(
        "keep", "replacing ReLU6 by ReLU changes the network a little and lets it be equalized"
    )
    clip: Literal["max", "mse", "aciq", "kl"] = setting("mse", f"{base.CLIP}; the paper takes the largest magnitude")
    ranges: Literal["statistics", "images"] = setting("statistics", "source of activation ranges; from images by clip")
    deviations: float = setting(3.0, "a range from statistics is beta -+ this many gamma; the paper's 6", low=0.1)
    correction: Literal["statistics", "images", "none"] = setting(
        "statistics",
        "source of E[x] for the bias correction; not done after AdaRound, whose reconstruction includes the mean error",
    )
    bias_bits: Literal[16, 32] = setting(32, "bit width of biases")
    rounding: Literal["nearest", "adaround"] = setting(
        "nearest", "adaround needs synthesis_steps: noise says little about the network"
    )
    rounding_steps: int = setting(1000, "iterations of AdaRound per layer; its paper's 10,000", low=1)
    images: int = setting(
        64, "number of images to measure what statistics do not say, for AdaRound and for export", low=2
    )
    synthesis_steps: int = setting(
        0, "0 leaves the images Gaussian noise; more optimize them to the BatchNorm statistics as express does"
    )


BUDGETS = {
    "quick": Settings(),
    "published": Settings(absorb="all", relu6="replace", clip="max", deviations=6.0, rounding_steps=10_000),
}


def check(spec: QuantSpec, settings: Settings) -> None:
    """Refuse a QuantSpec that AdaRound cannot work with, before any work."""
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
    """Gaussian noise, optimized to the BatchNorm statistics with ``synthesis_steps``, (images, C, H, W)."""
    if settings.synthesis_steps:
        base.require_batchnorm(task.teacher, 'equalize" with "synthesis_steps')
        wanted = express.Settings(images=settings.images, synthesis_steps=settings.synthesis_steps)
        return express.synthesize(task, wanted)
    task.session.reseed("noise")
    return torch.randn(settings.images, *task.image_shape).to(task.device)


def input_means(folded: folding.Folded, images: Tensor, settings: Settings) -> dict[str, Tensor]:
    """E[x] of each layer: from the statistics where they are wanted and known, otherwise measured on the images."""
    measured = correction.measured_inputs(folded.network, images)
    known = correction.expected_inputs(folded.network, folded.statistics)
    return measured if settings.correction == "images" else measured | known
