"""What recipes share: their outcome, the report, generated images, and the checks before any work."""

import dataclasses
import difflib
import textwrap
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfqlib import batchnorm, quantizer, synthesis
from dfqlib.data import check_image_shape
from dfqlib.deploy import integer
from dfqlib.deploy.onnx import export_onnx
from dfqlib.deploy.saving import save_quantized
from dfqlib.errors import InputError, NonFiniteError
from dfqlib.evaluation.metrics import Comparison, agreement, compare
from dfqlib.generators import Generator, UnconditionalGenerator
from dfqlib.network import graph
from dfqlib.network.inference import Batches, predict
from dfqlib.network.plain import plain
from dfqlib.spec import QuantSpec
from dfqlib.training import channels_last
from dfqlib.training.adversarial import Trainee, trained_by_adam
from dfqlib.training.task import ImageShape, Task

IMAGES = 256
"""How many images of a generator set the ranges, and how many the report holds."""

LR_S = "learning rate of students from scratch, SGD with momentum 0.9 and weight decay 5e-4"
STEP_LR = "learning rate of the quantizers' step sizes as a share of lr"
OPTIMIZER = "of fine-tuning; SGD has momentum 0.9 and weight decay 5e-4"
SCHEDULE = "of the students' learning rates: step divides them by ten after 0.4 and 0.8 of the epochs; cosine ends at 0"
LOWER_BOUND = "smallest clip threshold as a share of max|x|, so that learned step sizes have room"
CLIP = "criterion for the clip thresholds, see dfqlib.clipping"
"""What settings of these names mean in several recipes."""


@dataclass
class Outcome:
    """The result of a recipe.

    Attributes:
        model: the student, quantized or smaller.
        images: the synthetic or given images that it was tuned on, (N, C, H, W).
        calibrated: the quantized network before fine-tuning; None for a smaller student.
    """

    model: nn.Module
    images: Tensor
    calibrated: nn.Module | None = None


@dataclass(repr=False)
class Report:
    """What ``dfqlib.quantize`` and ``dfqlib.distill`` return.

    Attributes:
        model: the student in eval mode; for ``quantize`` fake-quantized, with the teacher's layer names.
        images: the synthetic images, or those that were given, (N, C, H, W), in the teacher's normalized space.
        history: the losses every ten iterations, a row each, ready for a DataFrame.
        seconds: wall time.
        settings: everything needed to run it again: recipe, budget, seed, bit widths, the recipe's settings, versions,
            the processor, and the dtype of synthesis and training ("bfloat16" if ``bf16`` is set and the processor
            multiplies it, else "float32"); of given images their shape and digest.
        calibrated: the quantized network before fine-tuning, or None.
        interrupted: Ctrl-C ended the run early; ``model`` is as trained until then.
        steps: the step sizes while they are trained, a row every ten iterations, by quantizer their mean over channels.
        teacher: a frozen copy of the original network.
    """

    model: nn.Module
    images: Tensor
    history: list[dict[str, Any]]
    seconds: float
    settings: dict[str, Any]
    calibrated: nn.Module | None = None
    interrupted: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)
    teacher: nn.Module | None = None

    def __repr__(self) -> str:
        said = [self.settings.get("model", type(self.model).__name__)]
        spec = self.settings.get("spec")
        said += [str(spec)] if isinstance(spec, QuantSpec) else []
        said += [f"{name}={self.settings[name]!r}" for name in ("recipe", "budget", "seed") if name in self.settings]
        end = ", interrupted" if self.interrupted else ""
        return f"Report({', '.join(said)}, images={tuple(self.images.shape)}, seconds={self.seconds:.1f}{end})"

    @property
    def image_shape(self) -> ImageShape:
        """(channels, height, width) of the network's images."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def coverage(self) -> "quantizer.Coverage":
        """The share of multiply-accumulates that are quantized."""
        return quantizer.coverage(self.model, self.image_shape)

    def summary(self, loader: Batches | None = None) -> str:
        """One screen: the protocol, the bit widths of all layers, what is left in floating point, the accuracy.

        Args:
            loader: labeled real images for the accuracy; None for the agreement on the report's own images.
        """
        lines = [repr(self)]
        found = list(quantizer.quantizers(self.model))
        if found:
            weights = [f"{name} {q.bits}" for name, q in found if name.endswith("weight_quantizer")]
            tensors = [
                f"{name} {'' if getattr(q, 'signed', True) else 'u'}{q.bits}"
                for name, q in found
                if not name.endswith("weight_quantizer")
            ]
            lines += [_wrapped("weights (bits): ", [text.replace(".weight_quantizer", "") for text in weights])]
            lines += [_wrapped("activations (bits, u: unsigned): ", tensors), str(self.coverage())]
            lines += self._stored_in_7_bits()
        if loader is not None:
            lines.append(str(self.compare(loader)))
        elif self.teacher is not None and len(self.images):
            share = agreement(self.model, self.teacher, self.images)
            lines.append(
                f"agreement with the original on the {len(self.images):,} images it was tuned on: {share:.1f} %"
            )
        return "\n".join(lines)

    def _stored_in_7_bits(self) -> list[str]:
        try:
            narrowed = integer.narrowed(self.model)
        except InputError:  # no integer form
            return []
        counts = ", ".join(f"{name} ({count} channels)" for name, count in narrowed.items())
        return [f"stored in 7 bits in an exported file, so that no processor saturates: {counts}"] if counts else []

    def save(self, path: str | PathLike[str], **about: Any) -> Path:
        """Write the network to a file that ``dfqlib.load_quantized`` reads; arguments as ``dfqlib.save_quantized``."""
        return save_quantized(self, path, **about)

    def export(self, path: str | PathLike[str], **options: Any) -> Path:
        """Write the network as an integer ONNX file; arguments as ``dfqlib.export_onnx``."""
        return export_onnx(self, path, **options)

    def compare(self, loader: Batches) -> Comparison:
        """Compare the network with the original on labeled images, as ``dfqlib.compare``."""
        if self.teacher is None:
            raise InputError("report.teacher is None; call dfqlib.compare(report.model, teacher, loader)")
        return compare(self.model, self.teacher, loader)


def _wrapped(title: str, items: list[str]) -> str:
    return textwrap.fill(title + ", ".join(items), 100, subsequent_indent="  ")


def prepare_teacher(model: nn.Module, image_shape: ImageShape, device: torch.device) -> tuple[nn.Module, int]:
    """A frozen, plain copy of ``model`` on ``device``, and its number of classes (see ``network.plain``).

    Raises:
        InputError: it is no classifier of such images, or has something that quantization would lose.
        NonFiniteError: a weight or a logit is NaN or infinite.
    """
    check_image_shape(image_shape)
    for name, module in model.named_modules():
        if hasattr(module, "weight_quantizer") or type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise InputError(f'model: its layer "{name}" is quantized already; give the floating-point network')
    teacher = plain(model)
    for name, value in teacher.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise InputError(f'model: "{name}" is {value.dtype}; quantization starts from float32: give model.float()')
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f'model: "{name}" holds NaN or infinite values; load a sound checkpoint')
    teacher = teacher.to(device).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(2, *image_shape)
    logits = predict(teacher, images.clone())  # a network may overwrite what it is given
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("model: its logits on Gaussian images are NaN or infinite; load a sound checkpoint")
    if logits.shape[1] < 2:
        raise InputError(
            "model has one logit, and a classifier needs one per class: give it two, for example "
            "torch.cat([-z, z], 1) for a logit z"
        )
    rounding = 1e-4 * (1 + float(logits.abs().max()))
    if not torch.allclose(predict(teacher, images.clone()), logits, rtol=1e-3, atol=rounding):
        raise InputError(
            "model: its logits differ from call to call in eval mode, so something random is left on; for example "
            "F.dropout needs training=self.training"
        )
    traced = predict(graph.trace(teacher)[0], images)
    if not torch.allclose(traced, logits, rtol=1e-3, atol=rounding):
        raise InputError(
            "model: its traced graph computes something else, so it depends on values or changes tensors in place "
            "(x[:, 0] = ...); write those lines out of place"
        )
    return channels_last(teacher), logits.shape[1]


def make_generator(task: Task, latent: int, lr: float) -> Trainee[Generator]:
    """A new unconditional generator, and the Adam that trains it through all phases."""
    task.session.reseed("generator")
    return trained_by_adam(task, UnconditionalGenerator(task.image_shape, latent), lr)


def generated_images(generator: Generator, count: int | None = None) -> Tensor:
    """``count`` images (default: ``IMAGES``) of a generator in eval mode, of balanced labels if it takes labels."""
    return synthesis.from_generator(generator, IMAGES if count is None else count)[0]


RECIPES_WITHOUT_BATCHNORM = ("dafl", "dfad", "equalize")
RECIPES_WITH_IMAGES = ("calibrate", "real")
"""With real images these need no BatchNorm either."""


def require_batchnorm(model: nn.Module, recipe: str) -> None:
    """Raise InputError unless the model has BatchNorm statistics; the message names recipes that need none."""
    if not batchnorm.layers(model):
        others = ", ".join(map(repr, RECIPES_WITHOUT_BATCHNORM))
        given = " or ".join(map(repr, RECIPES_WITH_IMAGES))
        raise InputError(
            f"recipe={recipe!r} reads BatchNorm statistics and model has none: use one of {others}, or with real "
            f"images= {given}"
        )


def check_network(network: Any, argument: str) -> None:
    """Raise InputError unless ``network`` is a module."""
    if not isinstance(network, nn.Module):
        raise InputError(f"{argument}={type(network).__name__} must be a torch.nn.Module with its weights loaded")


def override(settings: Any, changes: dict[str, Any], recipe: str) -> Any:
    """The settings with ``changes``; raises InputError for names that the recipe does not have."""
    known = [item.name for item in dataclasses.fields(settings)]
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {close[0]}=" if close else ""
            raise InputError(f'{name}= is no setting of recipe="{recipe}"{hint}; it has {", ".join(known)}')
    return dataclasses.replace(settings, **changes)
