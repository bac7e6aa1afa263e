"""Fine-tuning on a fixed set of images: distill the teacher into a student on shifted, mirrored and mixed copies."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from dfqlib import losses, quantizer
from dfqlib.errors import InputError
from dfqlib.network.inference import predict
from dfqlib.spec import QuantSpec
from dfqlib.training.additions import Features, perturbed
from dfqlib.training.augment import cutmix, shift_and_flip
from dfqlib.training.numerics import adam, descend, mixed_precision
from dfqlib.training.session import Stateful
from dfqlib.training.task import Task

RULES = {
    "steps": (0, math.inf), "batch": (1, math.inf), "lr": (0, math.inf), "step_lr": (0, math.inf),
    "temperature": (1e-3, math.inf), "cutmix": (0, 1), "shift": (0, math.inf),
}  # fmt: skip
"""Smallest and largest value of the settings below, for ``check_settings``."""
SMALLEST_STEP = 0.01
"""How far a channel's learned step may shrink, as a share of what fine-tuning began with."""
QUANTIZED_RULES = {**RULES, "integer_share": (0, 1), "perturbation": (0, math.inf), "alignment": (0, math.inf)}


class Tuning(Protocol):
    """The settings of fine-tuning.

    Attributes:
        steps: fine-tuning steps of ``batch`` images.
        lr: peak learning rate of Adam's one cycle.
        step_lr: learning rate of the quantizers' steps as a share of ``lr``.
        temperature: of the distillation loss.
        cutmix: share of batches in which a box of each image comes from another.
        shift: largest random shift in pixels; flip: random mirroring.
        bf16: compute in bfloat16 where the processor has it.
    """

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def step_lr(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def cutmix(self) -> float: ...
    @property
    def shift(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def bf16(self) -> bool: ...


class QuantizedTuning(Tuning, Protocol):
    """The same for a quantized student.

    Attributes:
        integer_share: share of the last steps in which the student computes in integers.
        compiled: fine-tune in kernels compiled for the network where there is a compiler.
        perturbation, alignment: see ``Additions``.
    """

    @property
    def integer_share(self) -> float: ...
    @property
    def compiled(self) -> bool: ...
    @property
    def perturbation(self) -> float: ...
    @property
    def alignment(self) -> float: ...


def check_acting(settings: QuantizedTuning, *names: str) -> None:
    """Raise InputError for the first of these settings that is above 0 although there are no steps for it to act in."""
    for name in names:
        if getattr(settings, name) and settings.steps == 0:
            raise InputError(f"{name}={getattr(settings, name)} acts in fine-tuning, and steps=0 leaves none; drop one")


@dataclass(frozen=True)
class Additions:
    """What later papers add to the loss of a step; nothing by default.

    Attributes:
        labels: what each image shows, probabilities times the weight of their cross-entropy, shape (N, classes), rows
            of zeros where that is not to be learned (SynQ). CutMix mixes them by area, as in its paper.
        perturbation: step up the loss that each batch takes before it is learned (HAST, whose code learns the batch as
            it was, too).
        alignment: weight of the channel attention's distance from the teacher's (HAST).
    """

    labels: Tensor | None = None
    perturbation: float = 0.0
    alignment: float = 0.0


NOTHING = Additions()


class FineTuning:
    """Bring a student close to the teacher on mixtures of images, in place; its mode stays as it is.

    Where no setting changes the images from batch to batch, the teacher sees each of them once.

    Args:
        task: the job.
        student: quantized or smaller.
        images: shape (N, C, H, W).
        settings: see ``Tuning``; its ``lr`` is not read, the peak is ``lr``.
        lr: peak learning rate.
        network_at: the network that computes the student's logits at an iteration, where that is not ``student``.
        additions: further terms; ``alignment`` has no effect while ``network_at`` gives another network, which has no
            BatchNorm layers.
        compiled: compute ``student`` in kernels made for it (``quantizer.compiled``), unless ``alignment`` needs its
            BatchNorm layers.
    """

    def __init__(
        self,
        task: Task,
        student: nn.Module,
        images: Tensor,
        settings: Tuning,
        lr: float,
        network_at: Callable[[int], nn.Module] | None = None,
        additions: Additions = NOTHING,
        compiled: bool = False,
    ) -> None:
        self.task, self.student, self.images, self.settings = task, student, images, settings
        self.network_at, self.additions, self.compiled = network_at, additions, compiled
        self.optimizer = adam(quantizer.parameter_groups(student, lr, lr * settings.step_lr), lr)
        peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, peaks, total_steps=max(settings.steps, 1))
        self.smallest_steps = step_floors(student)
        self.aligned = additions.alignment > 0
        self.features: list[Features] = []
        self.teacher = task.teacher if self.aligned else quantizer.fused(task.teacher)
        self.cached_logits = self._cached_logits()
        self.fast_student: nn.Module | None = None

    def iteration(self, index: int) -> dict[str, Tensor]:
        """One update of the student: draw images, vary them, descend the loss, keep the step sizes positive."""
        rows = torch.randint(len(self.images), (self.settings.batch,))
        images, labels = self.vary(rows)
        network = self.network(index, images)
        if self.additions.perturbation:
            images = perturbed(images, lambda x: self.loss(network, x, labels, rows), self.additions.perturbation)
        loss = self.loss(network, images, labels, rows)
        descend(self.optimizer, loss)
        self.schedule.step()
        keep_above(self.smallest_steps)
        return {"loss": loss}

    def vary(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images of these rows, shifted, mirrored and mixed, and what they show where that is learned too."""
        settings, own_area = self.settings, 1.0
        images = shift_and_flip(self.images[rows], settings.shift, settings.flip)
        if torch.rand(()) < settings.cutmix:
            images, own_area = cutmix(images)
        if self.compiled:  # mirrored and shifted images are laid out otherwise, and each layout is compiled anew
            images = images.contiguous(memory_format=torch.channels_last)
        if self.additions.labels is None:
            return images, None
        labels = self.additions.labels[rows]
        return images, own_area * labels + (1 - own_area) * labels.flip(0)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, rows: Tensor) -> Tensor:
        """The distance of the student's logits from the teacher's, and the additions."""
        with mixed_precision(self.task.device, self.settings.bf16):
            target = self.teacher_logits(images, rows)
            logits = network(images)
        loss = losses.distillation_loss(logits.float(), target.float(), self.settings.temperature)
        if labels is not None:
            loss = loss + losses.label_loss(logits.float(), labels)
        if self.features:
            theirs, ours = (seen.take() for seen in self.features)
            if network is self.student:
                loss = loss + self.additions.alignment * losses.attention_loss(ours, theirs)
        return loss

    def network(self, index: int, images: Tensor) -> nn.Module:
        """What computes the student's logits at this iteration: itself, or the same in fewer passes."""
        network = self.student if self.network_at is None else self.network_at(index)
        traced = isinstance(self.student, fx.GraphModule) and not self.student.training
        if network is not self.student or self.aligned or not traced:
            return network
        if self.fast_student is None:  # not before: Ctrl-C waits for an iteration, and a finished run compiles nothing
            self.fast_student = quantizer.fused(self.student)
            if self.compiled:
                with mixed_precision(self.task.device, self.settings.bf16):
                    self.fast_student = quantizer.compiled(self.fast_student, images)
        return self.fast_student

    def teacher_logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """The teacher's logits of the images, computed once where the images do not change."""
        if self.cached_logits is not None:
            return self.cached_logits[rows]
        with torch.set_grad_enabled(images.requires_grad):
            return self.teacher(images)

    def _cached_logits(self) -> Tensor | None:
        settings = self.settings
        varied = settings.cutmix or settings.shift or settings.flip or self.additions.perturbation
        if varied or self.aligned or not settings.steps:
            return None
        return predict(self.task.teacher, self.images).to(self.task.device)

    def run(self, phase: str) -> None:
        """All iterations, under the name ``phase`` in the history."""
        state: dict[str, Stateful] = {"student": self.student, "optimizer": self.optimizer, "schedule": self.schedule}
        with ExitStack() as watched:
            networks = (self.task.teacher, self.student) if self.aligned else ()
            self.features = [watched.enter_context(Features(network)) for network in networks]
            check = partial(quantizer.check_steps, self.student)
            self.task.session.loop(phase, self.settings.steps, self.iteration, state, check)


def fine_tune(
    task: Task,
    student: nn.Module,
    images: Tensor,
    settings: Tuning,
    lr: float,
    *,
    phase: str = "fine-tuning",
    network_at: Callable[[int], nn.Module] | None = None,
    additions: Additions = NOTHING,
    compiled: bool = False,
) -> None:
    """Bring ``student`` close to the teacher on mixtures of ``images``, in place. Arguments: see ``FineTuning``."""
    FineTuning(task, student, images, settings, lr, network_at, additions, compiled).run(phase)


def step_floors(student: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The learned steps of quantizers with one per channel, and the smallest that each may become.

    Adam moves every number by about its learning rate, however small that number is: the step of a channel that is
    all but dead would be carried through zero. A whole tensor's step that gets there is a learning rate too high.
    """
    found = [each for _, each in quantizer.quantizers(student) if isinstance(each, quantizer.StepQuantizer)]
    learned = [each.step for each in found if each.step.requires_grad and each.step.numel() > 1]
    return [(step, SMALLEST_STEP * step.detach()) for step in learned]


@torch.no_grad()
def keep_above(floors: list[tuple[Tensor, Tensor]]) -> None:
    """Put steps that have sunk below their floor back onto it."""
    for step, floor in floors:
        step.clamp_(min=floor)


def peak_lr(lr: float, spec: QuantSpec) -> float:
    """The learning rate at 4 bits, doubled with each bit fewer that the narrower of weights and activations has."""
    return lr * 2.0 ** (4 - min(4, spec.weight_bits, spec.activation_bits))
