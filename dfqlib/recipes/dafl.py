"""DAFL (Chen et al., ICCV 2019): a generator trained by the teacher alone, and a student trained on its images.

The generator G minimizes ``0.05 L_oh + 5 L_ie + 0.01 L_a`` over the teacher T's outputs t and features f, no BatchNorm
needed. The terms favor images that T classifies with certainty, ``L_oh = CE(t, argmax t)``, equally many of each
class, ``L_ie = -H(mean_x p)``, and with large features, ``L_a = -mean|f|``, f the input of T's last layer. The student
S minimizes ``KL(T(x) || S(x))`` on the same images. Algorithm 1 updates both in turn:

- ``distill``: S is a smaller network, from scratch.
- ``quantize``: G is warmed up alone (it needs no student), the quantized S is calibrated on its images, and then both
  are trained in turn. The paper does not quantize.

Where the released code differs: it measures the entropy to base 10 (``variant="released"``), and reports the best epoch
on the test set, this recipe the last. Its weights are 0.05, 20 and 0.01 for CIFAR-100; and 1, 5 and 0.1 for MNIST, with
200 epochs of 512 images from 100 numbers each, G at 0.2 and a student trained by Adam at 0.002.

Taught in notebook 05.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfqlib import losses
from dfqlib.errors import InputError
from dfqlib.generators import Generator
from dfqlib.recipes import base
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training import adversarial
from dfqlib.training.adversarial import AdversarialTraining, Student, StudentLogits, Trainee
from dfqlib.training.settings import BF16, BaseSettings, setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = False


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Settings of DAFL; the defaults are the paper's for CIFAR-10.

    ``budget="quick"`` deviates so that minutes suffice: 5 epochs of warm-up, 9 of fine-tuning and 16 of distillation,
    each 25 iterations of 64 images; G learns at 0.005, fine-tuning takes Adam at 1e-4 (an under-trained generator's
    images are off-distribution, and a larger rate makes the student forget), the students' learning rates fall to zero
    along a cosine, thresholds have no lower bound, and all is computed in bfloat16.
    """

    one_hot_weight: float = setting(0.05, "weight of certainty in G's loss")
    balance_weight: float = setting(5.0, "weight of the classes' balance in G's loss (beta in the paper)")
    activation_weight: float = setting(0.01, "weight of the features' size in G's loss (alpha in the paper)")
    variant: Literal["paper", "released"] = setting("paper", "entropy in nats, or to base 10")
    latent: int = setting(1000, "length of the noise vector", low=1)
    distill_epochs: int = setting(2000, "epochs of distill")
    warm_up_epochs: int = setting(200, "epochs of G alone, before quantize sets ranges")
    epochs: int = setting(40, "epochs of fine-tuning a quantized student")
    iterations: int = setting(120, "iterations of an epoch", low=1)
    batch: int = setting(1024, "images of each iteration", low=2)
    lr_g: float = setting(0.02, "learning rate of G, Adam")
    lr_s: float = setting(0.1, base.LR_S)
    lr: float = setting(0.001, "learning rate of fine-tuning")
    step_lr: float = setting(0.1, base.STEP_LR, high=1)
    lower_bound: float = setting(0.3, base.LOWER_BOUND, high=1)
    optimizer: Literal["sgd", "adam"] = setting("sgd", base.OPTIMIZER)
    schedule: Literal["step", "cosine"] = setting("step", base.SCHEDULE)
    bf16: bool = setting(False, BF16)

    def __post_init__(self) -> None:
        super().__post_init__()
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
    generator = base.make_generator(task, settings.latent, settings.lr_g)
    updates = settings.distill_epochs * settings.iterations
    trainee = adversarial.from_scratch(student, settings.lr_s, settings.schedule, updates)
    train(task, "distillation", updates, generator, [trainee], settings)
    return Outcome(student, base.generated_images(generator.network))


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """The generator alone, ranges from its images, then generator and quantized student in turn."""
    generator = base.make_generator(task, settings.latent, settings.lr_g)
    train(task, "warm-up", settings.warm_up_epochs * settings.iterations, generator, [], settings)
    images = base.generated_images(generator.network)
    calibrated = calibrated_student(task, spec, images, lower_bound=settings.lower_bound)
    student = copy.deepcopy(calibrated)
    updates = settings.epochs * settings.iterations
    trainee = adversarial.quantized(
        student, settings.optimizer, settings.lr, settings.step_lr, settings.schedule, updates
    )
    train(task, "fine-tuning", updates, generator, [trainee], settings)
    return Outcome(student, base.generated_images(generator.network), calibrated)


def train(
    task: Task, phase: str, rounds: int, generator: Trainee[Generator], students: list[Student], settings: Settings
) -> None:
    """Rounds of an update of G by the teacher's outputs and features, and one of the student, if there is one."""

    def generator_loss(target: Tensor, _: StudentLogits) -> Tensor:
        weights = (settings.one_hot_weight, settings.balance_weight, settings.activation_weight)
        return losses.dafl_loss(target, last.input, *weights, settings.variant)

    with LastInput(task.teacher) as last:
        AdversarialTraining(
            task, [generator], students, settings.batch, generator_loss, losses.distillation_loss, bf16=settings.bf16
        ).run(phase, rounds)


class LastInput:
    """Hook that keeps the input of the last convolution or linear layer that runs: the features of a classifier.

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
