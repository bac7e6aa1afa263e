"""How good a network is, and how far it is from its teacher, with the uncertainty that few images leave.

Taught in notebook 07.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfqlib.errors import InputError
from dfqlib.network.inference import Batches, as_batches, as_images, evaluating, logits_of, predict

SQNR_BATCH = 64
"""Images whose layers' outputs ``sqnr`` holds at once: a few tens of MB for a network of 32x32 images."""


def evaluate(model: nn.Module, loader: Batches) -> float:
    """Top-1 accuracy in percent.

    Args:
        model: classifier; its mode is restored afterwards.
        loader: batches of (images, labels), or one pair (images, labels), normalized as the model expects.

    Raises:
        InputError: no images, images of a shape the model cannot take, or labels beyond its classes.

    Taught in notebook 07.
    """
    return 100.0 * float(correct(model, loader).double().mean())


def correct(model: nn.Module, loader: Batches) -> Tensor:
    """Which images are classified correctly, in the loader's order: booleans of shape (N,). Errors as ``evaluate``."""
    chosen, labels = predict_classes(model, loader)
    return chosen == labels


@torch.inference_mode()
def predict_classes(model: nn.Module, loader: Batches) -> tuple[Tensor, Tensor]:
    """The classes that the model chooses and the labels, both (N,), in the loader's order. Errors as ``evaluate``."""
    chosen, expected = [], []
    with evaluating(model):
        for images, labels in as_batches(loader):
            logits = logits_of(model, images)
            if len(labels) and int(labels.max()) >= logits.shape[1]:
                raise InputError(
                    f"loader: label {int(labels.max())} is beyond the model's {logits.shape[1]} classes; "
                    "check the folder names (one folder per class), or pass classes= in the order of the logits"
                )
            chosen.append(logits.argmax(1).cpu())
            expected.append(labels.cpu())
    if not sum(map(len, expected)):
        raise InputError("loader has no images; check the folder or the data set's name")
    return torch.cat(chosen), torch.cat(expected)


def agreement(model: nn.Module, teacher: nn.Module, images: Tensor | Batches) -> float:
    """Share of images on which both choose the same class, in percent; images as a tensor or a loader."""
    images = as_images(images)
    if not len(images):
        raise InputError("images is empty; agreement needs at least one image")
    same = predict(model, images).argmax(1) == predict(teacher, images).argmax(1)
    return 100.0 * float(same.double().mean())


@dataclass(frozen=True)
class Comparison:
    """A model beside its teacher on the same images.

    Attributes:
        top1: of the model, in percent.
        teacher_top1: of the teacher, in percent.
        difference: model minus teacher, in points.
        standard_error: of the difference, paired: only images on which one is right and the other wrong count.
        agreement: share of images on which both choose the same class, in percent.
        images: how many images there were.
    """

    top1: float
    teacher_top1: float
    difference: float
    standard_error: float
    agreement: float
    images: int

    def __str__(self) -> str:
        return (
            f"{self.top1:.2f} % against the teacher's {self.teacher_top1:.2f} %: "
            f"{self.difference:+.2f} ± {self.standard_error:.2f} points on {self.images:,} images"
        )


def compare(model: nn.Module, teacher: nn.Module, loader: Batches) -> Comparison:
    """Paired comparison on the same images: far less noisy than two accuracies, whose images vary together.

    Errors as ``evaluate``.

    Taught in notebook 07.
    """
    if isinstance(loader, Iterator):  # both must see its batches
        loader = list(loader)
    chosen, labels = predict_classes(model, loader)
    return compare_classes(chosen, predict_classes(teacher, loader)[0], labels)


def compare_classes(chosen: Tensor, teacher_chosen: Tensor, labels: Tensor) -> Comparison:
    """``compare`` from the classes that both chose and the labels, each of shape (N,)."""
    own, reference = (chosen == labels).double(), (teacher_chosen == labels).double()
    change = own - reference
    return Comparison(
        top1=100 * float(own.mean()),
        teacher_top1=100 * float(reference.mean()),
        difference=100 * float(change.mean()),
        standard_error=100 * float(change.std(correction=0)) / len(change) ** 0.5,
        agreement=100 * float((chosen == teacher_chosen).double().mean()),
        images=len(change),
    )


@torch.inference_mode()
def sqnr(model: nn.Module, teacher: nn.Module, images: Tensor) -> dict[str, float]:
    """Signal to quantization noise of each conv's and linear's output, in dB, by the layer's name.

    ``10 log10(sum y^2 / sum (y_q - y)^2)``: every 6 dB are one bit. Layers that were fine-tuned together work at 5 dB.
    Images run a few at a time and energies are summed in float64, so memory does not grow with their number.

    Args:
        model: what ``quantize_layers`` made of the teacher, so that layers have the same names.
        teacher: the floating-point network.
        images: normalized, shape (N, C, H, W).

    Taught in notebook 07.
    """
    signal, noise = defaultdict[str, float](float), defaultdict[str, float](float)
    # Parts of about one size: a lone image runs through kernels that round otherwise, and codes on the edge flip.
    for part in images.tensor_split(max(1, -(-len(images) // SQNR_BATCH))):
        noisy = _layer_outputs(model, part)
        for name, y in _layer_outputs(teacher, part).items():
            if name in noisy:
                signal[name] += float(y.double().square().sum())
                noise[name] += float((noisy[name].double() - y).square().sum())
    return {name: _decibels(signal[name] / max(noise[name], 1e-30)) for name in signal}


def _decibels(ratio: float) -> float:
    return 10 * math.log10(ratio) if ratio else -math.inf


def _layer_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with evaluating(model):
            logits_of(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
