"""Fine-tuning on a fixed set of images: distill the teacher into a student on shifted, mirrored and mixed copies.

Read ``FineTuning.iteration`` first.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

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
from dfqlib.training.settings import BF16, BaseSettings, setting
from dfqlib.training.task import Task

SMALLEST_STEP = 0.01
"""How far the learned step size of a channel may shrink, as a share of its value before fine-tuning."""


@dataclass(frozen=True, eq=False)
class Tuning(BaseSettings):
    """Settings of fine-tuning."""

    steps: int = setting(400, "iterations of fine-tuning")
    batch: int = setting(64, "images of each iteration", low=1)
    lr: float = setting(2e-4, "peak learning rate of Adam's one cycle at 4 bits, doubled for each bit fewer")
    step_lr: float = setting(0.1, "learning rate of the quantizers' step sizes as a share of the weights'")
    temperature: float = setting(4.0, "of the distillation loss", low=1e-3)
    cutmix: float = setting(1.0, "share of fine-tuning batches in which a box of each image comes from another", high=1)
    shift: int = setting(2, "largest random shift of the images, in pixels")
    flip: bool = setting(True, "mirror images at random")
    bf16: bool = setting(True, BF16)


@dataclass(frozen=True, eq=False)
class QuantizedTuning(Tuning):
    """Settings of fine-tuning a quantized student further: computing as its file will, and ideas of HAST."""

    integer_share: float = setting(
        0.0,
        "share of the iterations, the last ones, in which the student computes in integers, biases and sums included, "
        "as its exported file does; what integers round is written into the result, whose accuracy is then the file's",
        high=1,
    )
    compiled: bool = setting(
        False, "fine-tune in kernels compiled for the network: 20 s to compile, then iterations in 3/4 of the time"
    )
    perturbation: float = setting(
        0.0, "length of the step, in normalized pixels, up the student's loss that each batch takes first; HAST's 0.01"
    )
    alignment: float = setting(
        0.0, "weight of the channel attention's distance; HAST's 1000, its distillation loss counted 20 times"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_acting(self, "perturbation", "alignment")


def check_acting(settings: Tuning, *names: str) -> None:
    """Raise InputError for the first of these settings that is above 0 although ``steps=0`` leaves no fine-tuning."""
    for name in names:
        if getattr(settings, name) and settings.steps == 0:
            raise InputError(f"{name}={getattr(settings, name)} acts in fine-tuning, and steps=0 leaves none; drop one")


@dataclass(frozen=True)
class Additions:
    """What later papers add to an iteration; nothing by default.

    Attributes:
        labels: probabilities of the classes times the weight of the label cross-entropy, shape (N, classes), rows of
            zeros for images whose label is not learned (SynQ). CutMix mixes them by area, as in its paper.
        perturbation: length of the step up the loss that each batch takes before the update (HAST, whose code trains
            on the unchanged batch as well).
        alignment: weight of the distance between the channel attentions of student and teacher (HAST).
    """

    labels: Tensor | None = None
    perturbation: float = 0.0
    alignment: float = 0.0


NOTHING = Additions()


class FineTuning:
    """Distill the teacher into a student on mixtures of images, in place; the student's mode does not change.

    Where no setting varies the images, the teacher's logits are computed once for all iterations.

    Args:
        task: the teacher, its images' shape and the session.
        student: quantized or smaller.
        images: shape (N, C, H, W).
        settings: of fine-tuning; ``settings.lr`` is not read.
        lr: peak learning rate, for example ``peak_lr(settings.lr, spec)``.
        network_at: returns the network that computes the student's logits at an iteration; None for ``student``.
        additions: further terms. ``alignment`` acts only while ``student`` itself computes the logits: it needs the
            BatchNorm layers.
        compiled: compute ``student`` with ``quantizer.compiled``, unless ``alignment`` is above 0.
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
        """The images of these rows, shifted, mirrored and mixed, and the labels in ``additions`` mixed alike."""
        settings, own_area = self.settings, 1.0
        images = shift_and_flip(self.images[rows], settings.shift, settings.flip)
        if torch.rand(()) < settings.cutmix:
            images, own_area = cutmix(images)
        if self.compiled:  # shifting and mirroring change the memory layout, and each layout is compiled anew
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
        """The network that computes the student's logits at this iteration: the student, or a faster form of it."""
        network = self.student if self.network_at is None else self.network_at(index)
        traced = isinstance(self.student, fx.GraphModule) and not self.student.training
        if network is not self.student or self.aligned or not traced:
            return network
        if self.fast_student is None:  # only now, so that resuming a finished run compiles nothing
            self.fast_student = quantizer.fused(self.student)
            if self.compiled:
                with mixed_precision(self.task.device, self.settings.bf16):
                    self.fast_student = quantizer.compiled(self.fast_student, images)
        return self.fast_student

    def teacher_logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """The teacher's logits of these images, from the cache if there is one."""
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
    """Distill the teacher into ``student`` on mixtures of ``images``, in place. Arguments: see ``FineTuning``."""
    FineTuning(task, student, images, settings, lr, network_at, additions, compiled).run(phase)


def step_floors(student: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The learned step sizes of the quantizers per channel, each with the smallest values that it may take.

    Adam changes every number by about its learning rate, however small the number is, so the step size of a nearly
    dead channel could cross zero. A step size per tensor has no floor: if it gets that small, the learning rate is too
    high.
    """
    found = [each for _, each in quantizer.quantizers(student) if isinstance(each, quantizer.StepQuantizer)]
    learned = [each.step for each in found if each.step.requires_grad and each.step.numel() > 1]
    return [(step, SMALLEST_STEP * step.detach()) for step in learned]


@torch.no_grad()
def keep_above(floors: list[tuple[Tensor, Tensor]]) -> None:
    """Raise step sizes that have fallen below their floor to it."""
    for step, floor in floors:
        step.clamp_(min=floor)


def peak_lr(lr: float, spec: QuantSpec) -> float:
    """``lr``, the learning rate at 4 bits, doubled for each bit fewer; the smaller of the two bit widths counts."""
    return lr * 2.0 ** (4 - min(4, spec.weight_bits, spec.activation_bits))
