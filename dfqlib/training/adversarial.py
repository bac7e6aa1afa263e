"""What recipes with a generator share: generators and students in turn against one teacher."""

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

Answers = Callable[[], list[Tensor]]
"""Every student's logits of a generator's images; computed when asked for."""
GeneratorLoss = Callable[[Tensor, Answers], Tensor]
"""(teacher's logits, the students' answers) -> what a generator descends."""
StudentLoss = Callable[[Tensor, Tensor], Tensor]
"""(student's logits, teacher's logits) -> what a student descends."""

Milestones = tuple[float, ...]
"""Shares of a phase after which the learning rate is divided by ten."""
MOMENTUM = 0.9
DECAY = 5e-4


Network = TypeVar("Network", bound=nn.Module, covariant=True)
G = TypeVar("G", bound=Generator)


@dataclass(frozen=True)
class Player(Generic[Network]):
    """A network and what trains it.

    Attributes:
        network: a generator or a student.
        optimizer: of its parameters.
        schedule: of the learning rate; takes one step with each move.
        faster: what computes the network's answers, where that is not the network itself.
    """

    network: Network
    optimizer: Optimizer
    schedule: LRScheduler | None = None
    faster: nn.Module | None = None

    def descend(self, loss: Tensor) -> None:
        """One move."""
        descend(self.optimizer, loss)
        if self.schedule is not None:
            self.schedule.step()


@dataclass(frozen=True)
class Rules:
    """How a round is played.

    Attributes:
        batch: images that a generator makes for a move.
        generator_loss: what generators descend; None leaves them as they are, in eval mode.
        student_loss: what students descend.
        student_moves: moves of each student in a round. The only move of the only student takes the images that the
            generators have just moved on; of several, each takes new ones, so that no two students stay alike.
        bf16: compute in bfloat16 where the processor has it.
    """

    batch: int
    generator_loss: GeneratorLoss | None
    student_loss: StudentLoss
    student_moves: int = 1
    bf16: bool = False


def play(
    task: Task, phase: str, rounds: int, generators: Sequence[Player[Generator]], students: Sequence[Player[nn.Module]],
    rules: Rules,
) -> None:  # fmt: skip
    """Rounds of one move of each generator, then ``rules.student_moves`` of each student; all in place.

    A student descends the mean of its loss over the generators. Without students the generators move alone.
    """
    for player in generators:
        player.network.train(rules.generator_loss is not None)

    def draw(player: Player[Generator], learn: bool) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(learn), mixed_precision(task.device, rules.bf16):
            images = player.network.sample(rules.batch).float()
            return images, task.teacher(images).float()

    def answer(student: Player[nn.Module], images: Tensor) -> Tensor:
        with mixed_precision(task.device, rules.bf16):
            return (student.faster or student.network)(images).float()

    def generator_move(player: Player[Generator], loss_of: GeneratorLoss) -> tuple[Tensor, Tensor, Tensor]:
        images, target = draw(player, learn=True)
        loss = loss_of(target, lambda: [answer(student, images) for student in students])
        player.descend(loss)
        return images.detach(), target.detach(), loss

    def student_move(student: Player[nn.Module], made: list[tuple[Tensor, Tensor]]) -> Tensor:
        loss = mean([rules.student_loss(answer(student, images), target) for images, target in made])
        student.descend(loss)
        return loss

    def one_round(_: int) -> dict[str, Tensor]:
        values, made = {}, []
        if rules.generator_loss is not None:
            moves = [generator_move(player, rules.generator_loss) for player in generators]
            values["generator"] = mean([loss for _, _, loss in moves])
            made = [(images, target) for images, target, _ in moves]
        spent = not made or rules.student_moves * len(students) > 1
        found = []
        for _ in range(rules.student_moves):
            for student in students:
                if spent:
                    made = [draw(player, learn=False) for player in generators]
                found.append(student_move(student, made))
        return {"loss": mean(found), **values} if found else values

    state = {**_state("generator", generators), **_state("student", students)}
    task.session.loop(phase, rounds, one_round, state, lambda: _check(students))


def trained_by_adam(task: Task, generator: G, lr: float) -> Player[G]:
    """A generator on the task's device, at a constant learning rate."""
    channels_last(generator.to(task.device))
    return Player(generator, adam(generator.parameters(), lr))


def from_scratch(
    student: nn.Module, lr: float, schedule: str, steps: int, milestones: Milestones, *, nesterov: bool = False
) -> Player[nn.Module]:
    """A student with random weights, in training mode, and the papers' SGD."""
    sgd = torch.optim.SGD(student.train().parameters(), lr, MOMENTUM, weight_decay=DECAY, nesterov=nesterov)
    return Player(student, sgd, decayed(sgd, schedule, steps, milestones))


def quantized(
    student: nn.Module, optimizer: str, lr: float, step_lr: float, schedule: str, steps: int, *, nesterov: bool = False
) -> Player[nn.Module]:
    """A calibrated student; its mode stays as it is, its steps train at the share ``step_lr`` of ``lr``."""
    groups = quantizer.parameter_groups(student, lr, lr * step_lr)
    descent = make_optimizer(optimizer, groups, lr, momentum=MOMENTUM, weight_decay=DECAY, nesterov=nesterov)
    faster = None if student.training else quantizer.fused(student)
    return Player(student, descent, decayed(descent, schedule, steps, ()), faster)


def decayed(optimizer: Optimizer, schedule: str, steps: int, milestones: Milestones) -> LRScheduler:
    """The learning rate over ``steps``: divided by ten at each milestone ("step"), or to zero along a cosine."""
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, max(steps, 1))
    return MultiStepLR(optimizer, [round(share * steps) for share in milestones])


def mean(values: list[Tensor]) -> Tensor:
    """Of scalars."""
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def reinitialized(model: nn.Module) -> nn.Module:
    """The same architecture with new random weights and BatchNorm statistics, trainable.

    Modules are asked to ``reset_parameters()``, as torch's own can; the values of any other parameter are shuffled,
    which keeps their scale and forgets what they mean.
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


def _state(kind: str, players: Sequence[Player[nn.Module]]) -> dict[str, Stateful]:
    state: dict[str, Stateful] = {}
    for index, player in enumerate(players):
        state |= {f"{kind} {index}": player.network, f"{kind} {index} optimizer": player.optimizer}
        if player.schedule is not None:
            state[f"{kind} {index} schedule"] = player.schedule
    return state


def _check(students: Sequence[Player[nn.Module]]) -> dict[str, float]:
    """The steps of the first student, which is the result, after a look at those of all."""
    steps = [quantizer.check_steps(player.network) for player in students]
    return steps[0] if steps else {}
