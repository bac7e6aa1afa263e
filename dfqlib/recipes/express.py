"""Express, our own quick path: a few hundred images out of noise, then a short fine-tuning against the teacher.

1. Optimize a batch of noise until each BatchNorm layer sees its stored mean and variance (norms not squared, as in
   DeepInversion; ``losses.bn_norm_loss``) and the teacher each image's label, under a random shift and flip.
2. Quantize the network and set its steps from those images by the MSE criterion.
3. Fine-tune weights and steps against the teacher's soft outputs, with CutMix of the images, BatchNorm fixed.

Four later papers' ideas are options, each off by default, each adapted from a generator or another loop to this one:

* ``superposed`` (Qimera, NeurIPS 2021): images between classes, by mixed targets of the label loss.
* ``hard_samples``, ``perturbation``, ``alignment`` (HAST, CVPR 2023): images that stay hard, made harder while they are
  learned, and features that agree.
* ``adaptability`` (AdaDFQ, CVPR 2023): half of the images made against the calibrated student.
* ``low_pass``, ``selective_labels`` (SynQ, ICLR 2025): blurred images, and labels learned where the teacher sees them.

Taught in notebook 07.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import losses, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.deploy import integer
from dfqlib.errors import InputError
from dfqlib.network.inference import predict
from dfqlib.recipes.base import Outcome, check_settings
from dfqlib.spec import QuantSpec
from dfqlib.training import additions, distillation
from dfqlib.training.augment import low_pass, shift_and_flip
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = True


@dataclass(frozen=True)
class Settings:
    """Settings of express; what is 0 by default from ``superposed`` on is a later paper's idea, switched off.

    Attributes:
        images: synthetic images.
        synthesis_batch: how many of them at most are optimized together; BatchNorm statistics are matched over them.
        synthesis_steps: Adam steps on the pixels, at a cosine-decayed ``synthesis_lr``.
        plateau: synthesis ends early, in its last quarter, where its loss falls by less than this share in 20 steps; 0
            takes all steps.
        label_weight: weight of the label cross-entropy beside the BatchNorm loss.
        shift: largest random shift in pixels; flip: random mirroring; both in synthesis and in fine-tuning.
        steps: fine-tuning steps of ``batch`` images; 0 leaves the network calibrated.
        lr: peak learning rate of Adam's one cycle at 4 bits, doubled with each bit fewer (the smaller width counts).
        step_lr: learning rate of the quantizers' steps as a share of ``lr``.
        temperature: of the distillation loss.
        cutmix: share of fine-tuning batches in which a box of each image comes from another.
        integer_share: share of the last steps in which the student computes in integers, biases and sums included, as
            its exported file will, and what integers round is written into the result, whose accuracy is then the
            file's; 0 for fake quantization throughout.
        bf16: compute in bfloat16 where the processor has it; the result is always evaluated in float32.
        compiled: fine-tune in kernels compiled for the network where there is a compiler: some 20 s at first, then
            steps of three quarters of the time.
        superposed: probability of an image's label being a mixture of classes; Qimera's 0.4.
        hard_samples: weight beta of HAST's (1 - p_y)^2 CE, in place of ``label_weight`` and the plain cross-entropy;
            there 10, beside squared BatchNorm losses. Here 1 already keeps the statistics from matching; try 0.2.
        perturbation: length of the step, in the normalized pixels' units, that each batch takes up the student's loss
            before it is learned; HAST's 0.01.
        alignment: weight of the channel attention's distance; HAST's 1000, its distillation loss counted 20 times.
        adaptability: weight of AdaDFQ's generator loss, in place of the label cross-entropy, in the second half of the
            images, which the first half's ranges do not follow; there 1, and a generator that goes on learning.
            Here too 1 is much beside the statistics; try 0.2.
        low_pass: standard deviation, in pixels, of the blur of the finished images; SynQ's 0.05 to 0.25 at 32 pixels.
        selective_labels: the student also learns the labels of images of difficulty 1 - p_y below this threshold;
            SynQ's 0.5 to 0.7. The teacher looks once at the whole image (there at each batch): later it is CutMix.
        student_label_weight: of the cross-entropy with these labels; SynQ searches 0.005 to 5.
    """

    images: int = 256
    synthesis_batch: int = 256
    synthesis_steps: int = 200
    synthesis_lr: float = 0.1
    plateau: float = 0.01
    label_weight: float = 0.2
    shift: int = 2
    flip: bool = True
    steps: int = 400
    batch: int = 64
    lr: float = 2e-4
    step_lr: float = 0.1
    temperature: float = 4.0
    cutmix: float = 1.0
    integer_share: float = 0.0
    bf16: bool = True
    compiled: bool = False
    superposed: float = 0.0
    hard_samples: float = 0.0
    perturbation: float = 0.0
    alignment: float = 0.0
    adaptability: float = 0.0
    low_pass: float = 0.0
    selective_labels: float = 0.0
    student_label_weight: float = 0.05

    def __post_init__(self) -> None:
        check_settings(
            self, images=(2, math.inf), synthesis_batch=(2, math.inf), synthesis_steps=(1, math.inf),
            synthesis_lr=(0, math.inf), plateau=(0, 1), label_weight=(0, math.inf), superposed=(0, 1),
            hard_samples=(0, math.inf), adaptability=(0, math.inf), low_pass=(0, math.inf), selective_labels=(0, 1),
            student_label_weight=(0, math.inf), **distillation.QUANTIZED_RULES,
        )  # fmt: skip
        if self.label_weight == self.hard_samples == 0 and (self.superposed or self.selective_labels):
            name = "superposed" if self.superposed else "selective_labels"
            raise InputError(
                f"{name}={getattr(self, name)} is about labels, which label_weight=0 keeps out of the images; set "
                f"label_weight or hard_samples above 0, or {name}=0"
            )
        if self.adaptability and self.images < 4:
            raise InputError(f"images={self.images} is too few for adaptability, which splits them; take at least 4")
        distillation.check_acting(self, "perturbation", "alignment", "selective_labels")


BUDGETS = {"quick": Settings(), "published": Settings(images=512, steps=1200)}
"""No paper is behind "published": it is what a search (benchmarks/search.py) found to pay within minutes."""


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Noise to images, images to ranges, ranges and weights fine-tuned."""
    images = synthesize(task, settings)
    calibrated = calibrated_student(task, spec, images)
    if settings.adaptability:
        images = torch.cat([images, synthesize(task, settings, calibrated)])
    student = copy.deepcopy(calibrated)
    fine_tune(task, student, images, spec, settings, learned_labels(task, images, settings))
    return Outcome(student, images, calibrated)


def wanted_labels(task: Task, settings: Settings) -> Tensor:
    """What each image is to show: classes, shape (images,), or with ``superposed`` probabilities (images, classes)."""
    labels = synthesis.balanced_labels(settings.images, task.classes, task.device)
    if not settings.superposed:
        return labels
    return additions.superposed_labels(labels, task.classes, settings.superposed, task.session.reseed("mixtures"))


def synthesize(task: Task, settings: Settings, rival: nn.Module | None = None) -> Tensor:
    """Images whose BatchNorm statistics and labels suit the teacher, shape (images, C, H, W).

    With ``adaptability`` it is the first half of them, and the second half against a ``rival``.
    """
    rival = None if rival is None else copy.deepcopy(rival).requires_grad_(False)

    def objective(images: Tensor, logits: Tensor, probe: BatchNormProbe, labels: Tensor) -> dict[str, Tensor]:
        statistics = losses.bn_norm_loss(probe)
        if rival is not None:
            weight, answers = settings.adaptability, rival(images)
            label = losses.adaptability_loss(logits.float(), answers.float(), labels)
        elif settings.hard_samples:
            weight, label = settings.hard_samples, losses.hard_sample_loss(logits.float(), labels)
        else:
            weight, label = settings.label_weight, F.cross_entropy(logits, labels)
        return {"loss": statistics + weight * label, "bn": statistics, "label": label}

    labels = wanted_labels(task, settings)
    if settings.adaptability:
        labels = labels[settings.images // 2 :] if rival is not None else labels[: settings.images // 2]
    batches = math.ceil(len(labels) / settings.synthesis_batch)
    augment = partial(shift_and_flip, shift=settings.shift, flip=settings.flip)
    images = synthesis.from_noise(
        task.teacher, labels, task.image_shape, objective,
        synthesis.adam(settings.synthesis_lr, settings.synthesis_steps), settings.synthesis_steps,
        task.session, batch=math.ceil(len(labels) / batches), first_batch=0 if rival is None else batches,
        augment=augment, bf16=settings.bf16, plateau=settings.plateau,
    )  # fmt: skip
    return low_pass(images, settings.low_pass) if settings.low_pass else images


def learned_labels(task: Task, images: Tensor, settings: Settings) -> Tensor | None:
    """The labels that the student learns too, by their weight, (images, classes); rows of zeros where it does not."""
    if not settings.selective_labels:
        return None
    seen = predict(task.teacher, images).to(task.device)
    trusted = losses.trusted_labels(seen, wanted_labels(task, settings), settings.selective_labels)
    return settings.student_label_weight * trusted


def fine_tune(
    task: Task,
    student: nn.Module,
    images: Tensor,
    spec: QuantSpec,
    settings: distillation.QuantizedTuning,
    labels: Tensor | None = None,
) -> None:
    """Bring ``student`` close to the teacher on mixtures of ``images`` (and to weighted ``labels``), in place."""
    first_integer_step = settings.steps - round(settings.integer_share * settings.steps)
    if settings.integer_share:
        integer.prepare(student, images)
    as_exported = integer.simulate(student) if settings.integer_share else student
    distillation.fine_tune(
        task, student, images, settings, distillation.peak_lr(settings.lr, spec),
        network_at=lambda index: student if index < first_integer_step else as_exported,
        additions=distillation.Additions(labels, settings.perturbation, settings.alignment), compiled=settings.compiled,
    )  # fmt: skip
    if settings.integer_share:
        integer.settle(student)
