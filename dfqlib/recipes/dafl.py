"""DAFL (Chen et al., ICCV 2019): a generator trained to please the teacher alone, and a student that follows.

The generator G minimizes ``0.05 L_oh + 5 L_ie + 0.01 L_a`` over the teacher T's outputs t and features f, no BatchNorm
needed: images that T is sure of, ``L_oh = CE(t, argmax t)``; as many of each class, ``L_ie = -H(mean_x p)``; that
excite T, ``L_a = -mean|f|``, where f is what enters T's last layer. The student S minimizes ``KL(T(x) || S(x))`` on the
same images. Algorithm 1 moves both in turn:

- ``distill``: S is a smaller network, from scratch.
- ``quantize``: G is warmed up alone (it needs no student), the ranges of the quantized S come from its images, and
  then both move in turn. The paper does not quantize.

Where the released code differs: it measures the entropy in decimal digits (``variant="released"``), and reports the
best epoch on the test set, here the last. Its weights are 0.05, 20 and 0.01 for CIFAR-100; and 1, 5 and 0.1 for MNIST,
with 200 epochs of 512 images from 100 numbers each, G at 0.2 and a student trained by Adam at 0.002.

Taught in notebook 05.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfqlib import losses, synthesis
from dfqlib.errors import InputError
from dfqlib.generators import UnconditionalGenerator
from dfqlib.recipes.base import Outcome, check_settings
from dfqlib.spec import QuantSpec
from dfqlib.training.adversarial import Answers, Player, Rules, from_scratch, play, quantized, trained_by_adam
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False

IMAGES = 256
"""How many images the ranges are set from, and how many the report shows."""
MILESTONES = (0.4, 0.8)
"""Where the learning rate of a student trained from scratch is divided by ten, as shares of its epochs."""


@dataclass(frozen=True)
class Settings:
    """Settings of DAFL; the defaults are the paper's for CIFAR-10.

    ``budget="quick"`` deviates so that minutes suffice: 5 epochs of warm-up, 9 of fine-tuning and 16 of distillation,
    each 25 iterations of 64 images; G learns at 0.005, fine-tuning takes Adam at 1e-4 (so young a G draws images far
    from the data, on which a faster student unlearns it), the students' rates fall to zero along a cosine, thresholds
    have no lower bound, and all is computed in bfloat16.

    Attributes:
        one_hot_weight: of certainty in G's loss.
        balance_weight: of the classes' balance in G's loss.
        activation_weight: of the features' size in G's loss (alpha and beta in the paper scale the last two).
        variant: "paper" measures entropy in nats, "released" in decimal digits.
        latent: length of the noise vector.
        distill_epochs: of ``distill``, ``iterations`` batches of ``batch`` images each.
        warm_up_epochs: of G alone, before ``quantize`` sets ranges.
        epochs: of fine-tuning a quantized student.
        lr_g: learning rate of G, Adam.
        lr_s: learning rate of a student from scratch, SGD with momentum 0.9 and decay 5e-4, divided by ten after 0.4
            and 0.8 of its epochs.
        lr: learning rate of fine-tuning.
        step_lr: learning rate of the steps as a share of ``lr``.
        lower_bound: smallest clip threshold of the quantized student as a share of max|x|, as in DFQF: room for steps
            that are learned.
        optimizer: of fine-tuning, "sgd" or "adam".
        schedule: of the students' rates: "step", the paper's, or "cosine".
        bf16: compute in bfloat16 where the processor has it; the result is always evaluated in float32.
    """

    one_hot_weight: float = 0.05
    balance_weight: float = 5.0
    activation_weight: float = 0.01
    variant: Literal["paper", "released"] = "paper"
    latent: int = 1000
    distill_epochs: int = 2000
    warm_up_epochs: int = 200
    epochs: int = 40
    iterations: int = 120
    batch: int = 1024
    lr_g: float = 0.02
    lr_s: float = 0.1
    lr: float = 0.001
    step_lr: float = 0.1
    lower_bound: float = 0.3
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["step", "cosine"] = "step"
    bf16: bool = False

    def __post_init__(self) -> None:
        check_settings(
            self, one_hot_weight=(0, math.inf), balance_weight=(0, math.inf), activation_weight=(0, math.inf),
            latent=(1, math.inf), distill_epochs=(0, math.inf), warm_up_epochs=(0, math.inf), epochs=(0, math.inf),
            iterations=(1, math.inf), batch=(2, math.inf), lr_g=(0, math.inf), lr_s=(0, math.inf), lr=(0, math.inf),
            step_lr=(0, 1), lower_bound=(0, 1),
        )  # fmt: skip
        if self.one_hot_weight == self.balance_weight == self.activation_weight == 0:
            raise InputError(
                "one_hot_weight=0, balance_weight=0 and activation_weight=0 leave the generator nothing to learn; set "
                "one above 0"
            )


BUDGETS = {
    "quick": Settings(
        distill_epochs=16, warm_up_epochs=5, epochs=9, iterations=25, batch=64, lr_g=0.005, lr=1e-4, lower_bound=0.0,
        optimizer="adam", schedule="cosine", bf16=True,
    ),
    "published": Settings(),
}  # fmt: skip


def distill(task: Task, student: nn.Module, settings: Settings) -> Outcome:
    """Algorithm 1: generator and student in turn."""
    generator = make_generator(task, settings)
    steps = settings.distill_epochs * settings.iterations
    follower = from_scratch(student, settings.lr_s, settings.schedule, steps, MILESTONES)
    train(task, "distillation", steps, generator, [follower], settings)
    return Outcome(student, synthesis.from_generator(generator.network, IMAGES)[0])


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """The generator alone, ranges from its images, then generator and quantized student in turn."""
    generator = make_generator(task, settings)
    train(task, "warm-up", settings.warm_up_epochs * settings.iterations, generator, [], settings)
    images = synthesis.from_generator(generator.network, IMAGES)[0]
    calibrated = calibrated_student(task, spec, images, lower_bound=settings.lower_bound)
    student = copy.deepcopy(calibrated)
    steps = settings.epochs * settings.iterations
    follower = quantized(student, settings.optimizer, settings.lr, settings.step_lr, settings.schedule, steps)
    train(task, "fine-tuning", steps, generator, [follower], settings)
    return Outcome(student, synthesis.from_generator(generator.network, IMAGES)[0], calibrated)


def make_generator(task: Task, settings: Settings) -> Player[UnconditionalGenerator]:
    """A new G and its Adam."""
    task.session.reseed("generator")
    return trained_by_adam(task, UnconditionalGenerator(task.image_shape, settings.latent), settings.lr_g)


def train(
    task: Task, phase: str, steps: int, generator: Player[UnconditionalGenerator], students: list[Player[nn.Module]],
    settings: Settings,
) -> None:  # fmt: skip
    """G by the teacher's outputs and features, and the student, if there is one, on G's images."""

    def generator_loss(target: Tensor, _: Answers) -> Tensor:
        return losses.dafl_loss(
            target, last.input, settings.one_hot_weight, settings.balance_weight, settings.activation_weight,
            settings.variant,
        )  # fmt: skip

    rules = Rules(settings.batch, generator_loss, losses.distillation_loss, bf16=settings.bf16)
    with LastInput(task.teacher) as last:
        play(task, phase, steps, [generator], students, rules)


class LastInput:
    """Sees what enters the last convolution or linear layer that runs: the features of a classifier.

    Attributes:
        input: of the last forward pass, shape (batch, features) or (batch, channels, height, width).
    """

    input: Tensor

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "LastInput":
        self._handles = [layer.register_forward_pre_hook(self._note) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.input = args[0].float()
