"""Accuracy of a network, and its difference from a teacher with the statistical uncertainty.

Taught in notebook 07.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfqlib.errors import InputError
from dfqlib.network.inference import Batches, as_batches, as_images, evaluating, logits_of, predict

SQNR_BATCH = 64
"""Images per forward pass of ``sqnr``, which holds the outputs of all layers."""


def evaluate(model: nn.Module, loader: Batches) -> float:
    """Top-1 accuracy in percent.

    Args:
        model: classifier; its mode is restored afterwards.
        loader: batches of (images, labels), or one pair (images, labels), images normalized.

    Raises:
        InputError: no images, images of a shape the model cannot take, or labels beyond its classes.

    Taught in notebook 07.
    """
    return 100.0 * float(correct(model, loader).double().mean())


def correct(model: nn.Module, loader: Batches) -> Tensor:
    """Whether each image of the loader is classified correctly, shape (N,). Errors as ``evaluate``."""
    chosen, labels = predict_classes(model, loader)
    return chosen == labels


@torch.inference_mode()
def predict_classes(model: nn.Module, loader: Batches) -> tuple[Tensor, Tensor]:
    """Predicted classes and labels, both (N,), in the loader's order. Errors as ``evaluate``."""
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
    """Percent of images, a tensor or a loader, on which both networks predict the same class."""
    images = as_images(images)
    if not len(images):
        raise InputError("images is empty; agreement needs at least one image")
    same = predict(model, images).argmax(1) == predict(teacher, images).argmax(1)
    return 100.0 * float(same.double().mean())


@dataclass(frozen=True)
class Comparison:
    """Accuracy of a model and its teacher on the same images.

    Attributes:
        top1: accuracy of the model, in percent.
        teacher_top1: accuracy of the teacher, in percent.
        difference: model minus teacher, in percentage points.
        standard_error: paired standard error of ``difference``: images on which both are right or both wrong add none.
        agreement: percent of images on which both predict the same class.
        images: number of images.
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
    """Paired comparison on the same images, whose standard error is smaller than that of two separate accuracies.

    Errors as ``evaluate``.

    Taught in notebook 07.
    """
    if isinstance(loader, Iterator):  # it is read twice
        loader = list(loader)
    chosen, labels = predict_classes(model, loader)
    return compare_classes(chosen, predict_classes(teacher, loader)[0], labels)


def compare_classes(chosen: Tensor, teacher_chosen: Tensor, labels: Tensor) -> Comparison:
    """``compare`` from the predicted classes of both and the labels, each of shape (N,)."""
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
    """Signal to quantization noise ratio of the output of each convolution and linear layer, in dB, by name.

    Computes ``10 log10(sum y^2 / sum (y_q - y)^2)``; 6 dB correspond to one bit. The sums are accumulated in float64
    over batches of ``SQNR_BATCH`` images.

    Args:
        model: the network that ``quantize_layers`` made of the teacher, with the same names of layers.
        teacher: the floating-point network.
        images: normalized, shape (N, C, H, W).

    Taught in notebook 07.
    """
    signal, noise = defaultdict[str, float](float), defaultdict[str, float](float)
    # Batches of similar size, because the kernels for a single image round differently.
    for part in images.tensor_split(max(1, -(-len(images) // SQNR_BATCH))):
        noisy = _layer_outputs(model, part)
        for name, y in _layer_outputs(teacher, part).items():
            if name in noisy:
                signal[name] += float(y.double().square().sum())
                noise[name] += float((noisy[name].double() - y).square().sum())
    ratios = {name: signal[name] / max(noise[name], 1e-30) for name in signal}
    return {name: 10 * math.log10(ratio) if ratio else -math.inf for name, ratio in ratios.items()}


def _layer_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    with recording(layers_of(model), lambda name, _, output: outputs.update({name: output})), evaluating(model):
        logits_of(model, images)
    return outputs


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


@contextmanager
def recording(modules: Mapping[str, nn.Module], record: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``record(name, input, output)`` after each call of one of the modules inside the block."""
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: record(name, args[0], output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
