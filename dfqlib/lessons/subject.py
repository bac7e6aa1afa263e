"""The teacher and the images that a lesson's parameters name.

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
from dfqlib.lessons.widgets import check_parameters
from dfqlib.recipes import base, express
from dfqlib.spec import QuantSpec
from dfqlib.training import Session, Task, calibrated_student

_BY_DATASET = {"digits": "digits_resnet8", "cifar10": "cifar10_resnet20"}


@dataclass(frozen=True)
class Subject:
    """A teacher and its test images.

    Attributes:
        teacher: the trained network in eval mode.
        test: batches of (images, labels) in memory.
        info: shape, classes and preprocessing of the network.
    """

    teacher: nn.Module
    test: list[tuple[Tensor, Tensor]]
    info: models.ModelInfo


def open_subject(dataset: str, arch: str = "", checkpoint: str = "", data_root: str = "") -> Subject:
    """The teacher and the test images that a lesson's parameters name.

    Args:
        dataset: "digits", another name of ``data.load_data``, or "folder:<path>" with one folder per class.
        arch: a name of ``models.names()``; empty for the choice of ``choose_arch``.
        checkpoint: file with the weights; empty for the bundled or the registered one.
        data_root: folder of torchvision's data sets; empty for the default of ``data.load_data``.

    Raises:
        InputError: a parameter is not text, names nothing, or does not fit the others.

    Taught in notebook 07.
    """
    given = {"dataset": dataset, "arch": arch, "checkpoint": checkpoint, "data_root": data_root}
    check_parameters(given, dict.fromkeys(given, (str,)))
    folder = dataset.removeprefix("folder:")
    if folder == dataset and dataset not in data.NORMALIZATION:
        known = ", ".join(data.NORMALIZATION)
        raise InputError(f'dataset="{dataset}" is unknown; known are {known} and "folder:<path>"')
    for name, path in (("dataset", folder if folder != dataset else ""), ("checkpoint", checkpoint)):
        if path and "://" not in path and not Path(path).exists():
            raise InputError(f'{name}: "{path}" does not exist; a relative path starts in the lesson\'s folder')
    info = models.info(arch or choose_arch(dataset, checkpoint))
    test = info.load_images(dataset, data_root=data_root or None)
    return Subject(models.load_model(info.name, checkpoint=checkpoint or None), list(test), info)


def choose_arch(dataset: str, checkpoint: str = "") -> str:
    """Name of the network for a checkpoint or a data set.

    Args:
        dataset: as in ``open_subject``; used when the checkpoint does not tell.
        checkpoint: a file name with the first digits of a registered network's hash.

    Raises:
        InputError: neither tells.
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
    """Real training images, (count, C, H, W), spread over the classes; None where there are none.

    They are the training split of a named data set, or the folder "train" beside a folder "test".
    """
    folder = Path(dataset.removeprefix("folder:"))
    if dataset.startswith("folder:"):
        sibling = folder.with_name("train")
        if folder.name != "test" or not sibling.is_dir():
            return None
        dataset = f"folder:{sibling}"
    images, _ = data.images_and_labels(subject.info.load_images(dataset, "train", data_root=data_root or None))
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]


def from_noise(
    subject: Subject,
    objective: synthesis.Objective,
    labels: Tensor,
    steps: int,
    *,
    seed: int = 0,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Synthesize images in one batch, always by Adam with a rate from 0.1 to 0, so that objectives can be compared.

    Args:
        subject: for its teacher.
        objective: as in ``synthesis.from_noise``.
        labels: target class of each image, shape (N,); an objective may ignore them.
        steps: iterations.
        seed: seed of the noise and of ``augment``; the noise does not depend on the objective.
        augment: random change of the images before the teacher runs.

    Returns:
        Images, (N, C, H, W), and the history of the losses.

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
        calibrated: the network after calibration.
        model: the network after fine-tuning.
        history: the logged losses.
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
    """Calibrate and fine-tune a network on given images, as the second half of the express recipe.

    Args:
        subject: for its teacher.
        images: (N, C, H, W), normalized.
        spec: how the network is quantized.
        settings: of express; those of synthesis are not used.
        seed: seed of fine-tuning; a report's images, seed and settings reproduce its network.
        method: clipping method, one of ``clipping.METHODS``.

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
