"""What the lessons on real networks begin with: a teacher, test images and a few real ones, from a lesson's parameters.

Taught in notebook 07.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfqlib import data, models, synthesis
from dfqlib.errors import InputError
from dfqlib.recipes import base, express
from dfqlib.spec import QuantSpec
from dfqlib.training import Session, Task, calibrated_student

__all__ = ["Subject", "Tuned", "choose_arch", "from_noise", "open_subject", "real_images", "tune"]

_BY_DATASET = {"digits": "digits_resnet8", "cifar10": "cifar10_resnet20"}


@dataclass(frozen=True)
class Subject:
    """What a lesson works on.

    Attributes:
        teacher: the trained network in eval mode.
        test: batches of (images, labels), read once and kept.
        info: shape, classes and preprocessing of the network.
    """

    teacher: nn.Module
    test: list[tuple[Tensor, Tensor]]
    info: models.ModelInfo


def open_subject(dataset: str, arch: str = "", checkpoint: str = "", data_root: str = "") -> Subject:
    """The teacher and the test images that a lesson's parameters name.

    Args:
        dataset: "digits", another name of ``data.load_data``, or "folder:<path>" with one folder per class.
        arch: a name of ``models.names()``; empty for the one that ``choose_arch`` finds.
        checkpoint: file with the weights; empty for the bundled or the registered one.
        data_root: where torchvision's sets lie; empty for the default of ``data.load_data``.

    Raises:
        InputError: a parameter is no text, names nothing, or does not fit the others.

    Taught in notebook 07.
    """
    given = {"dataset": dataset, "arch": arch, "checkpoint": checkpoint, "data_root": data_root}
    for name, value in given.items():
        if not isinstance(value, str):
            raise InputError(f"{name}={value!r} must be text, in quotes")
    folder = dataset.removeprefix("folder:")
    if folder == dataset and dataset not in data.NORMALIZATION:
        known = ", ".join(data.NORMALIZATION)
        raise InputError(f'dataset="{dataset}" is unknown; known are {known} and "folder:<path>"')
    for name, path in (("dataset", folder if folder != dataset else ""), ("checkpoint", checkpoint)):
        if path and "://" not in path and not Path(path).exists():
            raise InputError(f'{name}: "{path}" does not exist; a relative path starts in the lesson\'s folder')
    info = models.info(arch or choose_arch(dataset, checkpoint))
    test = _load(dataset, "test", info, data_root)
    size = tuple(test[0][0].shape[1:])
    if size != info.image_shape:
        raise InputError(f'dataset="{dataset}" has images of shape {size}, arch="{info.name}" takes {info.image_shape}')
    return Subject(models.load_model(info.name, checkpoint=checkpoint or None), test, info)


def choose_arch(dataset: str, checkpoint: str = "") -> str:
    """The known network that a checkpoint's file name or a data set speaks of.

    Args:
        dataset: as in ``open_subject``.
        checkpoint: a file name that holds the first digits of a registered network's hash decides.

    Raises:
        InputError: neither says which; name the network.
    """
    for name in models.names():
        sha256 = models.info(name).sha256
        if sha256 and sha256[:8] in Path(checkpoint).name:
            return name
    if dataset in _BY_DATASET:
        return _BY_DATASET[dataset]
    folder = Path(dataset.removeprefix("folder:"))
    if dataset.startswith("folder:") and folder.is_dir():
        classes = {entry.name for entry in folder.iterdir() if entry.is_dir()}
        for name in _BY_DATASET.values():
            if classes == set(models.info(name).classes):
                return name
    raise InputError(
        f'arch="" and dataset="{dataset}" does not say which network; set arch to one of {", ".join(models.names())}'
    )


def real_images(subject: Subject, dataset: str, count: int, data_root: str = "") -> Tensor | None:
    """Real training images for a ceiling, (count, C, H, W), spread over the classes; None where there are none.

    A named data set has a training split; beside a folder "test" there may be a folder "train".
    """
    folder = Path(dataset.removeprefix("folder:"))
    if dataset.startswith("folder:"):
        sibling = folder.with_name("train")
        if folder.name != "test" or not sibling.is_dir():
            return None
        dataset = f"folder:{sibling}"
    images = torch.cat([batch for batch, _ in _load(dataset, "train", subject.info, data_root)])
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]


def _load(dataset: str, split: str, info: models.ModelInfo, data_root: str) -> list[tuple[Tensor, Tensor]]:
    normalization: dict[str, Any] = {"mean": info.mean, "std": info.std, "classes": info.classes}
    return [
        (images, labels)
        for images, labels in data.load_data(dataset, split, data_root=data_root or None, **normalization)
    ]


def from_noise(
    subject: Subject,
    objective: synthesis.Objective,
    labels: Tensor,
    steps: int,
    *,
    seed: int = 0,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Images in one batch by any objective, with Adam at 0.1 that falls to zero: one setting, so that losses compare.

    Args:
        subject: holds the teacher; its weights' gradients are not computed.
        objective: as in ``synthesis.from_noise``.
        labels: what each image is to show, shape (N,); an objective may ignore them.
        steps: optimization steps.
        seed: of the noise and the changes; the same seed starts from the same noise whatever the objective.
        augment: random change of the images before the teacher sees them.

    Returns:
        Images, (N, C, H, W), and the losses, a row per look.

    Taught in notebook 03.
    """
    session = Session(seed, progress=False)
    teacher = copy.deepcopy(subject.teacher).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        images = synthesis.from_noise(
            teacher, labels, subject.info.image_shape, objective, synthesis.adam(0.1, steps), steps, session,
            batch=max(len(labels), 1), augment=augment,
        )  # fmt: skip
    return images, session.history


@dataclass(frozen=True)
class Tuned:
    """A quantized network before and after its fine-tuning.

    Attributes:
        calibrated: with ranges from images, not trained.
        model: fine-tuned.
        history: a row per look at the loss.
    """

    calibrated: nn.Module
    model: nn.Module
    history: list[dict[str, Any]]


def tune(
    subject: Subject,
    images: Tensor,
    spec: QuantSpec,
    settings: express.Settings,
    *,
    seed: int = 0,
    method: str = "mse",
) -> Tuned:
    """The second half of express on images of any origin: calibrate, then fine-tune against the teacher.

    Args:
        subject: holds the teacher.
        images: (N, C, H, W), normalized.
        spec: widths and steps.
        settings: of express; those of synthesis are not used.
        seed: of the fine-tuning; with a report's images, seed and settings its network comes out again.
        method: of clipping, one of ``clipping.METHODS``.

    Taught in notebook 07.
    """
    teacher, classes = base.prepare_teacher(subject.teacher, subject.info.image_shape, images.device)
    task = Task(teacher, subject.info.image_shape, classes, Session(seed, progress=False))
    with torch.random.fork_rng(devices=[]):
        calibrated = calibrated_student(task, spec, images, method=method)
        student = copy.deepcopy(calibrated)
        express.fine_tune(task, student, images, spec, settings)
    calibrated, student = (network.eval().requires_grad_(False) for network in (calibrated, student))
    return Tuned(calibrated, student, task.session.history)
