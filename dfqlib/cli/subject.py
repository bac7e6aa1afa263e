"""The network of ``--arch`` with its weights, and the images of ``--evaluate`` and ``--images``."""

import argparse
import dataclasses
import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dfqlib import models
from dfqlib.data import NORMALIZATION
from dfqlib.errors import InputError
from dfqlib.models import ModelInfo
from dfqlib.models.checkpoints import load_checkpoint
from dfqlib.network.inference import Batches, predict


def load_subject(options: argparse.Namespace) -> tuple[nn.Module, ModelInfo]:
    """The network of ``--arch`` with the weights of CHECKPOINT, and what is known of its images.

    The options override what the library knows of a named architecture; of one of the user's, what they do not say is
    empty.

    Raises:
        InputError: unknown architecture, required options missing for one of the user's, or no such weights.
    """
    given: dict[str, Any] = {name: getattr(options, name) for name in ("image_shape", "mean", "std", "classes")}
    if ":" not in options.arch:
        model = models.load_model(options.arch, checkpoint=options.checkpoint, sha256=options.sha256)
        changes = {name: value for name, value in given.items() if value}
        return model, dataclasses.replace(models.info(options.arch), **changes)
    for name, value in (("CHECKPOINT", options.checkpoint), ("--image-shape C,H,W", options.image_shape)):
        if value is None:
            raise InputError(f"--arch={options.arch} is your own, so {name} is needed too")
    build = partial(build_own, options.arch)
    model = load_checkpoint(build(), options.checkpoint, sha256=options.sha256)
    known: dict[str, Any] = {name: value or () for name, value in given.items()}
    return model, ModelInfo(options.arch, build, **known)


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


def labeled_images(
    name: str,
    model: nn.Module,
    info: ModelInfo,
    resize: int | None = None,
    option: str = "--evaluate",
    split: str = "test",
) -> Batches:
    """The images that an option names, checked against the network.

    Args:
        name: a folder of ``<class>/<image>``, or a data set of ``data.load_data``.
        model: the network.
        info: its preprocessing.
        resize: of ``--resize``.
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
    if is_folder and not (info.mean and info.std):
        raise InputError(f"{what} needs --mean and --std, those the network was trained with")
    source = f"folder:{name.removeprefix('folder:')}" if is_folder else name
    loader = info.load_images(source, split, resize=resize, what=what)
    outputs = predict(model, next(iter(loader))[0][:1]).shape[1]
    names = len(loader.dataset.classes)  # type: ignore[attr-defined]
    if outputs != names:
        raise InputError(
            f"{what} has {names} classes, the network {outputs}; give all names in its order with --classes"
        )
    return loader
