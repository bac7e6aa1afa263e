"""The network of ``--arch`` with its weights, and the images of ``--evaluate`` and ``--images``."""

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dfqlib import models
from dfqlib.data import NORMALIZATION, load_data
from dfqlib.errors import InputError
from dfqlib.models.checkpoints import load_checkpoint
from dfqlib.network.inference import Batches, predict


@dataclass(frozen=True)
class Subject:
    """The network to quantize and what is known of its images.

    Attributes:
        model: with its weights, in eval mode.
        arch: its name in ``models``, None for an architecture of the user's.
        image_shape: (channels, height, width).
        mean: of the images it was trained on, per channel; None if unknown.
        std: likewise.
        classes: names in the order of the logits; None if unknown.
    """

    model: nn.Module
    arch: str | None
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: tuple[str, ...] | None


def load_subject(options: argparse.Namespace) -> Subject:
    """The network of ``--arch`` with the weights of CHECKPOINT; options override what the library knows of it.

    Raises:
        InputError: unknown architecture, required options missing for one of the user's, or no such weights.
    """
    shape, mean, std, classes = options.image_shape, options.mean, options.std, options.classes
    if ":" not in options.arch:
        known = models.info(options.arch)
        model = models.load_model(options.arch, checkpoint=options.checkpoint, sha256=options.sha256)
        preprocessing = (mean or known.mean, std or known.std)
        return Subject(model, known.name, shape or known.image_shape, *preprocessing, classes or known.classes)
    for name, value in (("CHECKPOINT", options.checkpoint), ("--image-shape C,H,W", shape)):
        if value is None:
            raise InputError(f"--arch={options.arch} is your own, so {name} is needed too")
    model = load_checkpoint(build_own(options.arch), options.checkpoint, sha256=options.sha256)
    return Subject(model, None, shape, mean, std, classes)


def build_own(arch: str) -> nn.Module:
    """Import ``module``, from the current folder first, and call ``callable`` of ``"module:callable"``.

    Raises:
        InputError: no such module or name in it, or it returns no ``nn.Module``. Errors inside it are not caught.
    """
    name, _, attribute = arch.partition(":")
    if not all(part.isidentifier() for part in (*name.split("."), attribute)):
        raise InputError(f"--arch={arch} must be module:callable, for example mynet:build for build() in mynet.py")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the user's module was found, and what it imports was not
        raise InputError(f"--arch={arch}: no module {name} here; run in the folder that holds it") from None
    build = getattr(module, attribute, None)
    if not callable(build):
        raise InputError(f"--arch={arch}: {name} has no callable {attribute}; name what builds the network")
    model = build()
    if not isinstance(model, nn.Module):
        raise InputError(f"--arch={arch} made a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def labelled_images(name: str, subject: Subject, option: str = "--evaluate", split: str = "test") -> Batches:
    """The images that an option names, checked against the network.

    Args:
        name: a folder of ``<class>/<image>``, or a data set of ``data.load_data``.
        subject: the network, and its preprocessing.
        option: for messages.
        split: of a data set.

    Raises:
        InputError: no such data, unknown preprocessing, images of another shape, or class folders that cannot be
            assigned to the network's outputs.
    """
    what = f'{option}="{name}"'
    is_folder = name not in NORMALIZATION
    if is_folder and not Path(name.removeprefix("folder:")).is_dir():
        raise InputError(f"{what} is neither a folder nor one of {', '.join(NORMALIZATION)}")
    if is_folder and (subject.mean is None or subject.std is None):
        raise InputError(f"{what} needs --mean and --std, those the network was trained with")
    source = f"folder:{name.removeprefix('folder:')}" if is_folder else name
    loader = load_data(source, split, mean=subject.mean, std=subject.std, classes=subject.classes)
    images: Tensor = next(iter(loader))[0]
    found, wanted = tuple(images.shape[1:]), tuple(subject.image_shape)
    if found != wanted:
        raise InputError(f"{what} has images of shape {found}, the network takes {wanted}; resize them")
    outputs = predict(subject.model, images[:1]).shape[1]
    names = len(loader.dataset.classes)  # type: ignore[attr-defined]
    if outputs != names:
        raise InputError(
            f"{what} has {names} classes, the network {outputs}; give all names in its order with --classes"
        )
    return loader
