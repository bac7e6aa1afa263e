"""What recipes with a set of synthetic images share: a student brought close to the teacher on mixtures of them."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from dfqlib import losses, quantizer, synthesis
from dfqlib.errors import InputError
from dfqlib.evaluate import predict
from dfqlib.recipes._additions import Features, perturbed
from dfqlib.recipes.base import Task, descend
from dfqlib.spec import QuantSpec
from dfqlib.training import Stateful, adam, mixed_precision

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
    """Bring ``student`` close to the teacher on mixtures of ``images``, in place; its mode stays as it is.

    Where no setting changes the images from batch to batch, the teacher looks at each of them once.

    Args:
        task: the job.
        student: quantized or smaller.
        images: shape (N, C, H, W).
        settings: see ``Tuning``; its ``lr`` is not read, the peak is ``lr``.
        lr: peak learning rate.
        phase: name in the history.
        network_at: what computes the student's logits at a step, where that is not ``student`` itself.
        additions: further terms; ``alignment`` rests where ``network_at`` gives another network, which has no BatchNorm
            layers.
        compiled: compute ``student`` in kernels made for it (``quantizer.compiled``), unless ``alignment`` watches it.
    """
    optimizer = adam(quantizer.parameter_groups(student, lr, lr * settings.step_lr), lr)
    peaks = [group["lr"] for group in optimizer.param_groups]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=max(settings.steps, 1))
    watching = additions.alignment > 0  # what leaves the BatchNorm layers, which the faster forms do without
    fixed = isinstance(student, fx.GraphModule) and not student.training
    teacher = task.teacher if watching else quantizer.fused(task.teacher)
    floors = step_floors(student)
    varied = settings.cutmix or settings.shift or settings.flip or additions.perturbation
    answers = None if varied or watching or not settings.steps else predict(task.teacher, images).to(task.device)

    faster: nn.Module | None = None

    def network_of(index: int, batch: Tensor) -> nn.Module:
        nonlocal faster
        network = student if network_at is None else network_at(index)
        if network is not student or watching or not fixed:
            return network
        if faster is None:  # in the first step, so that Ctrl-C waits and a run that it has ended compiles nothing
            faster = quantizer.fused(student)
            if compiled:
                with mixed_precision(task.device, settings.bf16):
                    faster = quantizer.compiled(faster, batch)
        return faster

    def loss_of(network: nn.Module, labels: Tensor | None, answer: Tensor | None, batch: Tensor) -> Tensor:
        with mixed_precision(task.device, settings.bf16):
            with torch.set_grad_enabled(batch.requires_grad):
                target = teacher(batch) if answer is None else answer
            logits = network(batch)
        loss = losses.distillation_loss(logits.float(), target.float(), settings.temperature)
        if labels is not None:
            loss = loss + losses.label_loss(logits.float(), labels)
        if features:
            theirs, ours = (seen.take() for seen in features)
            if network is student:
                loss = loss + additions.alignment * losses.attention_loss(ours, theirs)
        return loss

    def step(index: int) -> dict[str, Tensor]:
        rows = torch.randint(len(images), (settings.batch,))
        batch, own = synthesis.shift_and_flip(images[rows], settings.shift, settings.flip), 1.0
        if torch.rand(()) < settings.cutmix:
            batch, own = cutmix(batch)
        if compiled:  # mirrored and shifted images are laid out otherwise, and each layout is compiled anew
            batch = batch.contiguous(memory_format=torch.channels_last)
        labels = None if additions.labels is None else additions.labels[rows]
        if labels is not None:
            labels = own * labels + (1 - own) * labels.flip(0)
        goal = partial(loss_of, network_of(index, batch), labels, None if answers is None else answers[rows])
        if additions.perturbation:
            batch = perturbed(batch, goal, additions.perturbation)
        loss = goal(batch)
        descend(optimizer, loss)
        cycle.step()
        keep_above(floors)
        return {"loss": loss}

    state: dict[str, Stateful] = {"student": student, "optimizer": optimizer, "schedule": cycle}
    with ExitStack() as watched:
        networks = (task.teacher, student) if additions.alignment else ()
        features = [watched.enter_context(Features(network)) for network in networks]
        task.session.loop(phase, settings.steps, step, state, partial(quantizer.check_steps, student))


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


def cutmix(images: Tensor) -> tuple[Tensor, float]:
    """Replace a random box of each image by that of another; its area is uniform in 0 ... 1 (CutMix, Yun et al.).

    Returns:
        The images, of which image n has its box from image -1 - n, and the share of the area that is an image's own.
    """
    height, width = images.shape[2:]
    share = float(torch.rand(())) ** 0.5
    tall, wide = round(height * share), round(width * share)
    top = int(torch.randint(height - tall + 1, ()))
    left = int(torch.randint(width - wide + 1, ()))
    mixed = images.clone()
    mixed[:, :, top : top + tall, left : left + wide] = images.flip(0)[:, :, top : top + tall, left : left + wide]
    return mixed, 1 - tall * wide / (height * width)
