"""Adversarial training (DFQF, Algorithm 1): generators and students updated in turn against one teacher.

Read ``AdversarialTraining.round`` first.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from dfqlib import quantizer
from dfqlib.generators import Generator
from dfqlib.training.numerics import adam, channels_last, descend, make_optimizer, mixed_precision
from dfqlib.training.session import Stateful
from dfqlib.training.task import Task

StudentLogits = Callable[[], list[Tensor]]
"""Computes each student's logits of a generator's images; a loss that does not need them does not call it."""
GeneratorLoss = Callable[[Tensor, StudentLogits], Tensor]
"""(teacher's logits, the students' logits) -> the loss of a generator."""
StudentLoss = Callable[[Tensor, Tensor], Tensor]
"""(student's logits, teacher's logits) -> the loss of a student."""
Batch = tuple[Tensor, Tensor]
"""A generator's images and the teacher's logits of them."""

MILESTONES = (0.4, 0.8)
"""Shares of its training after which the learning rate of a student from scratch is divided by ten (DFQF, DAFL)."""
MOMENTUM = 0.9
DECAY = 5e-4

Network = TypeVar("Network", bound=nn.Module, covariant=True)
G = TypeVar("G", bound=Generator)


@dataclass(frozen=True)
class Trainee(Generic[Network]):
    """A generator or a student, and what trains it.

    Attributes:
        network: the generator or the student.
        optimizer: of its parameters.
        schedule: of the learning rate, one step per update; None keeps it constant.
        faster: computes the same as ``network`` in fewer passes; None where there is no such form.
    """

    network: Network
    optimizer: Optimizer
    schedule: LRScheduler | None = None
    faster: nn.Module | None = None

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer and of the schedule."""
        descend(self.optimizer, loss)
        if self.schedule is not None:
            self.schedule.step()


Student = Trainee[nn.Module]


@dataclass(frozen=True)
class AdversarialTraining:
    """Generators and students trained in turn, in place.

    Attributes:
        task: the teacher and the session.
        generators: trained by ``generator_loss``.
        students: trained by ``student_loss``, each on the images of all generators; may be none.
        batch: images of each generator for an update.
        generator_loss: None leaves the generators unchanged and in eval mode.
        student_loss: averaged over the generators.
        student_updates: updates of each student in a round.
        bf16: compute in bfloat16 where the processor has it.
    """

    task: Task
    generators: Sequence[Trainee[Generator]]
    students: Sequence[Student]
    batch: int
    generator_loss: GeneratorLoss | None
    student_loss: StudentLoss
    student_updates: int = 1
    bf16: bool = False

    def round(self, _: int) -> dict[str, Tensor]:
        """One update of each generator, then ``student_updates`` of each student; returns the mean losses.

        With one student and one update per round, the student reuses the images of the generators' updates, as in the
        released code of DFQF and DAFL. Otherwise every update draws new images, so that students do not become alike.
        """
        found: dict[str, Tensor] = {}
        batches: list[Batch] = []
        if self.generator_loss is not None:
            updates = [self.generator_update(generator, self.generator_loss) for generator in self.generators]
            batches = [batch for batch, _ in updates]
            found["generator"] = mean([loss for _, loss in updates])
        reuse = bool(batches) and self.student_updates * len(self.students) == 1
        student_losses = []
        for _ in range(self.student_updates):
            for student in self.students:
                if not reuse:
                    batches = [self.sample(generator, learn=False) for generator in self.generators]
                student_losses.append(self.student_update(student, batches))
        return {"loss": mean(student_losses), **found} if student_losses else found

    def generator_update(self, generator: Trainee[Generator], loss_of: GeneratorLoss) -> tuple[Batch, Tensor]:
        """Update a generator; returns the batch that it was updated on, and its loss."""
        images, target = self.sample(generator, learn=True)
        loss = loss_of(target, lambda: [self.logits(student, images) for student in self.students])
        generator.update(loss)
        return (images.detach(), target.detach()), loss

    def student_update(self, student: Student, batches: Sequence[Batch]) -> Tensor:
        """Update a student on a batch of each generator; returns its loss."""
        loss = mean([self.student_loss(self.logits(student, images), target) for images, target in batches])
        student.update(loss)
        return loss

    def sample(self, generator: Trainee[Generator], learn: bool) -> Batch:
        """Images of a generator, and the teacher's logits of them; with gradients if it is to ``learn``."""
        with torch.set_grad_enabled(learn), mixed_precision(self.task.device, self.bf16):
            images = generator.network.sample(self.batch).float()
            return images, self.task.teacher(images).float()

    def logits(self, student: Student, images: Tensor) -> Tensor:
        """A student's logits of these images."""
        with mixed_precision(self.task.device, self.bf16):
            return (student.faster or student.network)(images).float()

    def run(self, phase: str, rounds: int) -> None:
        """All rounds, under the name ``phase`` in the history."""
        for generator in self.generators:
            generator.network.train(self.generator_loss is not None)
        state = {**_state("generator", self.generators), **_state("student", self.students)}
        self.task.session.loop(phase, rounds, self.round, state, self._check_step_sizes)

    def _check_step_sizes(self) -> dict[str, float]:
        """Those of the first student, which is the result, once those of all are known to be positive."""
        found = [quantizer.check_steps(student.network) for student in self.students]
        return found[0] if found else {}


def trained_by_adam(task: Task, generator: G, lr: float) -> Trainee[G]:
    """A generator on the task's device, at a constant learning rate."""
    channels_last(generator.to(task.device))
    return Trainee(generator, adam(generator.parameters(), lr))


def from_scratch(
    student: nn.Module,
    lr: float,
    schedule: str,
    updates: int,
    *,
    milestones: Sequence[float] = MILESTONES,
    nesterov: bool = False,
) -> Student:
    """A student with random weights, in training mode, and the papers' SGD (momentum 0.9, weight decay 5e-4)."""
    sgd = torch.optim.SGD(student.train().parameters(), lr, MOMENTUM, weight_decay=DECAY, nesterov=nesterov)
    return Trainee(student, sgd, decayed(sgd, schedule, updates, milestones))


def quantized(
    student: nn.Module,
    optimizer: str,
    lr: float,
    step_lr: float,
    schedule: str,
    updates: int,
    *,
    nesterov: bool = False,
) -> Student:
    """A calibrated student, its mode unchanged; its step sizes learn at the share ``step_lr`` of ``lr``."""
    groups = quantizer.parameter_groups(student, lr, lr * step_lr)
    descent = make_optimizer(optimizer, groups, lr, momentum=MOMENTUM, weight_decay=DECAY, nesterov=nesterov)
    faster = None if student.training else quantizer.fused(student)
    return Trainee(student, descent, decayed(descent, schedule, updates), faster)


def decayed(optimizer: Optimizer, schedule: str, updates: int, milestones: Sequence[float] = ()) -> LRScheduler:
    """A learning rate divided by ten after each of these shares of the updates ("step"), or to zero as a "cosine"."""
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, max(updates, 1))
    return MultiStepLR(optimizer, [round(share * updates) for share in milestones])


def mean(values: list[Tensor]) -> Tensor:
    """Mean of scalars."""
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def reinitialized(model: nn.Module) -> nn.Module:
    """The same architecture with new random weights and BatchNorm statistics, trainable.

    A module with ``reset_parameters()``, as torch's own have it, is reset by that. The values of any other parameter
    are shuffled, which keeps their scale.
    """
    tool = copy.deepcopy(model).requires_grad_(True)
    for module in tool.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            continue
        for parameter in module.parameters(recurse=False):
            values = parameter.data.flatten()
            parameter.data = values[torch.randperm(len(values)).to(values.device)].view_as(parameter)
    return tool


def _state(kind: str, trainees: Sequence[Trainee[nn.Module]]) -> dict[str, Stateful]:
    state: dict[str, Stateful] = {}
    for index, trainee in enumerate(trainees):
        state |= {f"{kind} {index}": trainee.network, f"{kind} {index} optimizer": trainee.optimizer}
        if trainee.schedule is not None:
            state[f"{kind} {index} schedule"] = trainee.schedule
    return state
