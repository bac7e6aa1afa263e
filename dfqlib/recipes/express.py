"""Express, our own quick path: a few hundred images out of noise, then a short fine-tuning against the teacher.

1. Optimize one batch of noise until each BatchNorm layer sees its stored mean and variance (norms not squared, as
   in DeepInversion; ``losses.bn_norm_loss``) and the teacher its label, under a random shift and flip.
2. Quantize the network and set its steps from those images by the MSE criterion.
3. Fine-tune weights and steps against the teacher's soft outputs, with CutMix of the images, BatchNorm fixed.

Taught in notebook 07.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import integer, losses, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.recipes import _tuning
from dfqlib.recipes.base import Outcome, Task, calibrated_student, check_settings
from dfqlib.spec import QuantSpec

NEEDS_BATCHNORM = True


@dataclass(frozen=True)
class Settings:
    """Settings of express.

    Attributes:
        images: synthetic images, optimized in one batch.
        synthesis_steps: Adam steps on the pixels, at a cosine-decayed ``synthesis_lr``.
        label_weight: weight of the label cross-entropy beside the BatchNorm loss.
        shift: largest random shift in pixels; flip: random mirroring.
        steps: fine-tuning steps of ``batch`` images.
        lr: peak learning rate of Adam's one cycle at 4 bits, doubled with each bit fewer.
        step_lr: learning rate of the steps as a share of ``lr``.
        temperature: of the distillation loss.
        cutmix: share of fine-tuning batches in which a box of each image comes from another.
        integer_share: share of the last steps in which the student computes in integers, biases and sums included, as
            its exported file will; 0 for fake quantization throughout.
        bf16: compute in bfloat16 where the processor has it; the result is always evaluated in float32.
    """

    images: int = 256
    synthesis_steps: int = 200
    synthesis_lr: float = 0.1
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

    def __post_init__(self) -> None:
        check_settings(
            self, images=(2, math.inf), synthesis_steps=(1, math.inf), synthesis_lr=(0, math.inf),
            label_weight=(0, math.inf), integer_share=(0, 1), **_tuning.RULES,
        )  # fmt: skip


BUDGETS = {"quick": Settings(), "published": Settings(images=1024, synthesis_steps=500, steps=4000)}


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Noise to images, images to ranges, ranges and weights fine-tuned."""
    images = synthesize(task, settings)
    calibrated = calibrated_student(task, spec, images)
    student = copy.deepcopy(calibrated)
    fine_tune(task, student, images, spec, settings)
    return Outcome(student, images, calibrated)


def synthesize(task: Task, settings: Settings) -> Tensor:
    """Images whose BatchNorm statistics and labels suit the teacher, shape (images, C, H, W)."""

    def objective(_: Tensor, logits: Tensor, probe: BatchNormProbe, labels: Tensor) -> dict[str, Tensor]:
        statistics, label = losses.bn_norm_loss(probe), F.cross_entropy(logits, labels)
        return {"loss": statistics + settings.label_weight * label, "bn": statistics, "label": label}

    labels = synthesis.balanced_labels(settings.images, task.classes, task.device)
    augment = partial(synthesis.shift_and_flip, shift=settings.shift, flip=settings.flip)
    return synthesis.from_noise(
        task.teacher, labels, task.image_shape, objective,
        synthesis.adam(settings.synthesis_lr, settings.synthesis_steps), settings.synthesis_steps,
        task.session, batch=settings.images, augment=augment, bf16=settings.bf16,
    )  # fmt: skip


def fine_tune(
    task: Task, student: nn.Module, images: Tensor, spec: QuantSpec, settings: _tuning.QuantizedTuning
) -> None:
    """Bring ``student`` close to the teacher on mixtures of ``images``, in place."""
    first_integer_step = settings.steps - round(settings.integer_share * settings.steps)
    if settings.integer_share:
        integer.prepare(student, images)
    as_exported = integer.simulate(student) if settings.integer_share else student
    _tuning.fine_tune(
        task, student, images, settings, _tuning.peak_lr(settings.lr, spec),
        network_at=lambda index: student if index < first_integer_step else as_exported,
    )  # fmt: skip
