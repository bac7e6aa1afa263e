"""What recipes with a set of synthetic images share: a student brought close to the teacher on mixtures of them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dfqlib import losses, quantizer, synthesis
from dfqlib.recipes.base import Task, descend
from dfqlib.spec import QuantSpec
from dfqlib.training import Stateful, mixed_precision

RULES = {
    "steps": (0, math.inf), "batch": (1, math.inf), "lr": (0, math.inf), "step_lr": (0, math.inf),
    "temperature": (1e-3, math.inf), "cutmix": (0, 1), "shift": (0, math.inf),
}  # fmt: skip
"""Smallest and largest value of the settings below, for ``check_settings``."""


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
    """The same with ``integer_share``: of the last steps, in which the student computes in integers."""

    @property
    def integer_share(self) -> float: ...


def fine_tune(
    task: Task,
    student: nn.Module,
    images: Tensor,
    settings: Tuning,
    lr: float,
    *,
    phase: str = "fine-tuning",
    network_at: Callable[[int], nn.Module] | None = None,
) -> None:
    """Bring ``student`` close to the teacher on mixtures of ``images``, in place; its mode stays as it is.

    Args:
        task: the job.
        student: quantized or smaller.
        images: shape (N, C, H, W).
        settings: see ``Tuning``; its ``lr`` is not read, the peak is ``lr``.
        lr: peak learning rate.
        phase: name in the history.
        network_at: what computes the student's logits at a step, where that is not ``student`` itself.
    """
    adam = torch.optim.Adam(quantizer.parameter_groups(student, lr, lr * settings.step_lr))
    peaks = [group["lr"] for group in adam.param_groups]
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, peaks, total_steps=max(settings.steps, 1))

    def step(index: int) -> dict[str, Tensor]:
        network = student if network_at is None else network_at(index)
        chosen = images[torch.randint(len(images), (settings.batch,))]
        batch = synthesis.shift_and_flip(chosen, settings.shift, settings.flip)
        if torch.rand(()) < settings.cutmix:
            batch = cutmix(batch)
        with mixed_precision(task.device, settings.bf16):
            with torch.no_grad():
                target = task.teacher(batch)
            logits = network(batch)
        loss = losses.distillation_loss(logits.float(), target.float(), settings.temperature)
        descend(adam, loss)
        cycle.step()
        return {"loss": loss}

    state: dict[str, Stateful] = {"student": student, "optimizer": adam, "schedule": cycle}
    task.session.loop(phase, settings.steps, step, state, partial(quantizer.check_steps, student))


def peak_lr(lr: float, spec: QuantSpec) -> float:
    """The learning rate at 4 bits, doubled with each bit fewer."""
    return lr * 2.0 ** (4 - min(4, spec.weight_bits, spec.activation_bits))


def cutmix(images: Tensor) -> Tensor:
    """Replace a random box of each image by that of another; its area is uniform in 0 ... 1 (CutMix, Yun et al.)."""
    height, width = images.shape[2:]
    share = float(torch.rand(())) ** 0.5
    tall, wide = round(height * share), round(width * share)
    top = int(torch.randint(height - tall + 1, ()))
    left = int(torch.randint(width - wide + 1, ()))
    mixed = images.clone()
    mixed[:, :, top : top + tall, left : left + wide] = images.flip(0)[:, :, top : top + tall, left : left + wide]
    return mixed
