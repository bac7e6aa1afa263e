"""ZeroQ (Cai et al., CVPR 2020): images distilled out of noise, then calibration, and no training.

1. *Distilled data.* Optimize Gaussian noise until every image alone has, before each BatchNorm layer, the stored mean
   and standard deviation: ``min_x sum_l ||mu_l(x) - mu_l||^2 + ||sigma_l(x) - sigma_l||^2``, and mean 0 and deviation 1
   itself (``losses.zeroq_loss``).
2. *Post-training quantization.* Run those images once through the quantized network and take its ranges from them.

Where the released code differs: it starts from uniform noise, and it pairs convolutions with BatchNorm layers by the
order of their definition, which breaks at a convolution without one. Here the BatchNorm layers themselves are hooked.
Its choice of a bit width per layer (the Pareto frontier) is not part of this recipe: ``bits`` sets the bit widths.
The paper's quantizer is ``QuantSpec(scheme="affine", granularity="channel", step="fixed")``.

Taught in notebook 03.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dfqlib import losses, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.recipes import base
from dfqlib.recipes.base import Outcome
from dfqlib.spec import QuantSpec
from dfqlib.training.settings import BF16, BaseSettings, setting
from dfqlib.training.task import Task, calibrated_student

NEEDS_BATCHNORM = True


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Settings of ZeroQ. Both budgets have the paper's 500 iterations; "quick" computes them in bfloat16."""

    images: int = setting(64, "distilled images, optimized in one batch", low=1)
    iterations: int = setting(500, "iterations of Adam on the pixels")
    lr: float = setting(0.5, "learning rate of Adam")
    patience: int = setting(100, "iterations without a lower loss after which lr is divided by ten")
    clip: Literal["max", "mse", "aciq", "kl"] = setting(
        "max", f"{base.CLIP}; the paper takes the largest magnitude, and affine quantizers always minimum and maximum"
    )
    bf16: bool = setting(False, BF16)


BUDGETS = {"quick": Settings(bf16=True), "published": Settings()}


def quantize(task: Task, spec: QuantSpec, settings: Settings) -> Outcome:
    """Distilled images, and ranges from them."""
    images = distilled_data(task, settings)
    model = calibrated_student(task, spec, images, method=settings.clip)
    return Outcome(model, images, calibrated=model)


def distilled_data(task: Task, settings: Settings) -> Tensor:
    """Images each of which has the stored statistics, shape (images, C, H, W)."""

    def objective(images: Tensor, _: Tensor, probe: BatchNormProbe, __: Tensor) -> dict[str, Tensor]:
        return {"loss": losses.zeroq_loss(probe, images)}

    unused_labels = synthesis.balanced_labels(settings.images, task.classes, task.device)
    return synthesis.from_noise(
        task.teacher, unused_labels, task.image_shape, objective,
        synthesis.adam_on_plateaus(settings.lr, settings.patience), settings.iterations, task.session,
        batch=settings.images, bf16=settings.bf16,
    )  # fmt: skip
