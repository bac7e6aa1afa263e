"""GDFQ (Xu et al., ECCV 2020): a class-conditional generator trained in turn with the quantized network.

Algorithm 1, for the full-precision network M, its quantized copy Q and a generator G of images ``G(z | y)``:

1. *Warm-up.* Update G alone, on ``CE(M(G(z|y)), y) + 0.1 BNS`` (Eq. 9): M is to recognize the label (Eq. 4), and the
   inputs of M's BatchNorm layers are to have the stored statistics (Eq. 5). The activation ranges of Q are the moving
   average over these images, and then fixed.
2. *Fine-tuning.* At each iteration draw z and y, update G by Eq. 9, and Q by ``CE(Q(x), y) + KD(Q(x), M(x))`` (Eq. 10).
   The BatchNorm statistics of Q stay as they are.

Where the released code differs: BNS is averaged over channels and layers and KD over classes as well
(``variant="released"``); the moving average of the ranges corrects its bias recursively, which widens them thousands of
times around the twentieth batch (not offered here); it reports the best epoch on the test set, this recipe the last.

The paper's quantizer, all layers at n bits, affine and per channel with ranges that are not learned, is
``paper_spec("w4a4")``. Any other ``QuantSpec`` works too: symmetric step sizes come from the warmed-up generator's
images by the MSE criterion, and learned ranges train at a tenth of the learning rate.

Taught in notebooks 04 and 06.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from dfqlib import losses, quantizer
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.generators import CategoricalBatchNormGenerator, ConditionalGenerator
from dfqlib.recipes import base
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training.numerics import adam, channels_last, descend, make_optimizer, mixed_precision
from dfqlib.training.session import Stateful
from dfqlib.training.settings import BF16, BaseSettings, setting
from dfqlib.training.task import Task, quantized_student

NEEDS_BATCHNORM = True


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Settings of GDFQ; the defaults are the paper's for CIFAR.

    ``budget="quick"`` deviates so that minutes suffice: 10 epochs (and 5 of warm-up) of 25 iterations of 64 images,
    Adam instead of SGD for Q at twice the learning rate, both rates falling to zero along a cosine, bfloat16.
    """

    epochs: int = setting(400, "epochs of fine-tuning")
    warm_up_epochs: int = setting(4, "epochs of the generator alone; 50 for ImageNet")
    range_epochs: int = setting(
        4, "first epochs, warm-up included, over which affine activation ranges are averaged", low=1
    )
    iterations: int = setting(200, "iterations of an epoch", low=1)
    batch: int = setting(200, "images of each iteration", low=2)
    training: Literal["alternating", "two-step"] = setting(
        "alternating", "update G and Q in turn, or (the ablation) train G to its end first and then Q"
    )
    generator: Literal["embedding", "categorical"] = setting(
        "embedding",
        "multiply the noise by the label's embedding (CIFAR), or give each class its own scale and shift in every "
        "BatchNorm (ImageNet, many classes)",
    )
    latent: int = setting(100, "length of the noise vector", low=1)
    label_weight: float = setting(1.0, "weight of the cross-entropy in G's loss")
    bn_weight: float = setting(0.1, "weight of BNS in G's loss, beta of Eq. 9")
    student_label_weight: float = setting(1.0, "weight of the cross-entropy in Q's loss")
    kd_weight: float = setting(1.0, "weight of KD in Q's loss, gamma of Eq. 10")
    temperature: float = setting(20.0, "temperature of KD", low=1e-3)
    variant: Literal["paper", "released"] = setting(
        "paper", "losses summed as in the paper, or averaged as in its code"
    )
    fixed_bn: bool = setting(True, "keep Q's BatchNorm statistics; False lets them drift to the generated images")
    stop_at: float | None = setting(
        None, "stop training G once M recognizes the label in this share of the images, over about ten batches"
    )
    lr_g: float = setting(1e-3, "learning rate of G, Adam with beta (0.5, 0.999)")
    lr_q: float = setting(1e-4, "learning rate of Q")
    optimizer: Literal["sgd", "adam"] = setting("sgd", "of Q; SGD has Nesterov's momentum 0.9 and weight decay 1e-4")
    schedule: Literal["step", "cosine"] = setting(
        "step", "divide both learning rates by ten every decay_epochs, or let them fall to zero along a cosine"
    )
    decay_epochs: int = setting(100, "see schedule", low=1)
    bf16: bool = setting(False, BF16)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_weight == self.bn_weight == 0:
            raise InputError("label_weight=0 and bn_weight=0 leave the generator nothing to learn; set one above 0")
        if self.student_label_weight == self.kd_weight == 0:
            raise InputError("student_label_weight=0 and kd_weight=0 leave Q nothing to learn; set one above 0")
        if self.label_weight == 0 < self.student_label_weight:
            raise InputError(
                f"student_label_weight={self.student_label_weight} teaches Q labels that label_weight=0 keeps out of "
                "the images; set both to 0, or neither"
            )
        if self.stop_at is not None:
            known = isinstance(self.stop_at, int | float) and not isinstance(self.stop_at, bool)
            if not known or not (self.label_weight > 0 and 0 < self.stop_at <= 1):
                raise InputError(
                    f"stop_at={self.stop_at!r} must be a share from 0 to 1, and needs label_weight above 0"
                )

    @property
    def warm_up_steps(self) -> int:
        """Iterations of G alone."""
        return (self.warm_up_epochs + (self.epochs if self.training == "two-step" else 0)) * self.iterations


BUDGETS = {
    "quick": Settings(
        epochs=10, warm_up_epochs=5, iterations=25, batch=64, lr_q=2e-4, optimizer="adam", schedule="cosine", bf16=True
    ),
    "published": Settings(),
}


def paper_spec(bits: str) -> QuantSpec:
    """The paper's quantizer for widths such as "w4a4": affine, per channel, fixed ranges, every layer at n bits."""
    spec = QuantSpec.parse(bits, scheme="affine", granularity="channel", step="fixed")
    return QuantSpec.parse(spec, edge_bits=spec.weight_bits)


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Algorithm 1: warm-up of G, ranges of Q, then both in turn."""
    task.session.reseed("generator")
    training = GeneratorTraining(task, settings)
    student = quantized_student(task, spec)
    with BatchNormProbe(task.teacher) as probe:
        averaging = settings.range_epochs * settings.iterations if spec.scheme == "affine" else 0
        warm_up(task, training, student, probe, averaging)
        if not averaging or not settings.warm_up_steps:
            quantizer.calibrate(student, base.generated_images(training.generator))
        calibrated = copy.deepcopy(student)
        fine_tune(task, training, student, probe, averaging - settings.warm_up_steps)
    for network in (calibrated, student):
        quantizer.set_mode(network, "quantize")
    return Outcome(student, base.generated_images(training.generator), calibrated)


def warm_up(
    task: Task, training: "GeneratorTraining", student: nn.Module, probe: BatchNormProbe, averaging: int
) -> None:
    """Train G alone; the ranges of Q are averaged over its first ``averaging`` batches."""
    settings = training.settings

    def iteration(index: int) -> dict[str, Tensor]:
        batch = training.draw(probe)
        if index < averaging:
            quantizer.set_mode(student, "calibrate")
            with torch.no_grad(), mixed_precision(task.device, settings.bf16):
                student(batch.images)
        return batch.losses

    task.session.loop("warm-up", settings.warm_up_steps, iteration, {**training.state, "student": student})


def fine_tune(
    task: Task, training: "GeneratorTraining", student: nn.Module, probe: BatchNormProbe, averaging: int
) -> None:
    """Train G and Q in turn, or Q alone where G has been trained to its end; Q in place."""
    settings = training.settings
    iterations = settings.epochs * settings.iterations
    groups = quantizer.parameter_groups(student, settings.lr_q, settings.lr_q / 10)
    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    optimizer = make_optimizer(settings.optimizer, groups, settings.lr_q, **sgd)
    decay = _decay(optimizer, settings, iterations)
    student.train(not settings.fixed_bn)
    faster = quantizer.fused(student) if settings.fixed_bn else student

    def iteration(index: int) -> dict[str, Tensor]:
        quantizer.set_mode(student, "calibrate" if index < averaging else "quantize")
        batch = training.draw(probe, learn=settings.training == "alternating")
        with mixed_precision(task.device, settings.bf16):
            logits = faster(batch.images)
        loss = losses.gdfq_student_loss(
            logits.float(), batch.teacher, batch.labels, settings.kd_weight, settings.temperature, settings.variant,
            settings.student_label_weight,
        )  # fmt: skip
        descend(optimizer, loss)
        decay.step()
        return {"loss": loss, **batch.losses}

    state = {**training.state, "student": student, "optimizer": optimizer, "schedule": decay}
    task.session.loop("fine-tuning", iterations, iteration, state, partial(quantizer.check_steps, student))


@dataclass(frozen=True)
class Batch:
    """Images generated for ``labels``, the full-precision network's logits of them, and G's losses."""

    images: Tensor
    labels: Tensor
    teacher: Tensor
    losses: dict[str, Tensor]


class GeneratorTraining:
    """G and what trains it: each call of ``draw`` makes a batch of images and, if wanted, updates G by Eq. 9.

    Attributes:
        state: what a resume file must hold.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task, self.settings = task, settings
        kind = ConditionalGenerator if settings.generator == "embedding" else CategoricalBatchNormGenerator
        self.generator = kind(task.image_shape, task.classes, settings.latent).to(task.device)
        channels_last(self.generator)
        self.adam = adam(self.generator.parameters(), settings.lr_g, betas=(0.5, 0.999))
        self.decay = _decay(self.adam, settings, settings.warm_up_steps + settings.epochs * settings.iterations)
        self.accuracy = RunningAccuracy()
        self.state: dict[str, Stateful] = {
            "generator": self.generator, "adam": self.adam, "decay": self.decay, "accuracy": self.accuracy
        }  # fmt: skip

    def draw(self, probe: BatchNormProbe, learn: bool = True) -> Batch:
        """Random labels, images for them, and an update of G unless it is fixed or good enough."""
        settings = self.settings
        learn = learn and not (settings.stop_at is not None and float(self.accuracy.best) > settings.stop_at)
        self.generator.train(learn)
        labels = torch.randint(self.task.classes, (settings.batch,), device=self.task.device)
        with torch.set_grad_enabled(learn):
            with mixed_precision(self.task.device, settings.bf16):
                images = self.generator.sample(settings.batch, labels).float()
                teacher = self.task.teacher(images).float()
            loss = losses.gdfq_generator_loss(
                teacher, labels, probe, settings.bn_weight, settings.variant, settings.label_weight
            )
        if learn:
            descend(self.adam, loss)
            self.decay.step()
        accuracy = self.accuracy(teacher.detach(), labels)
        return Batch(images.detach(), labels, teacher.detach(), {"generator": loss, "accuracy": accuracy})


class RunningAccuracy(nn.Module):
    """Share of images in which the full-precision network recognizes the label: moving mean over about ten batches."""

    mean: Tensor
    best: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("best", torch.zeros(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Add a batch to the mean; returns the batch's own share."""
        share = (logits.argmax(1) == labels).float().mean()
        self.mean.lerp_(share.to(self.mean), 0.1)
        torch.maximum(self.best, self.mean, out=self.best)
        return share


def _decay(optimizer: Optimizer, settings: Settings, steps: int) -> LRScheduler:
    if settings.schedule == "cosine":
        return CosineAnnealingLR(optimizer, max(steps, 1))
    return StepLR(optimizer, settings.decay_epochs * settings.iterations, gamma=0.1)
