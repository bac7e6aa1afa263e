"""Recipes: one paper, one file, each reading like its paper's algorithm; ``quantize`` and ``distill`` run them by name.

A recipe is a module of this folder with

* ``Settings``, a frozen dataclass derived from ``training.settings.BaseSettings``,
* ``BUDGETS``, the settings of "quick" and "published",
* ``NEEDS_BATCHNORM``, whether it reads BatchNorm statistics,
* ``quantize(task, spec, settings)``, and if the method distills, ``distill(task, student, settings)``: a recipe can do
  what it has a function for,
* ``check(spec, settings)`` if bit widths and settings can contradict each other; it raises before any work.
"""

import dataclasses
import difflib
import hashlib
import importlib
import os
import pkgutil
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dfqlib import quantizer
from dfqlib.errors import InputError
from dfqlib.network import convolution
from dfqlib.recipes import base, given
from dfqlib.recipes.base import Outcome, Report, check_network, override, prepare_teacher
from dfqlib.spec import QuantSpec
from dfqlib.training import Session, machine
from dfqlib.training.task import ImageShape, Task

__all__ = ["Report", "distill", "find", "names", "quantize", "usable_device"]

SHARED = ("base", "given", "ideas")


def names() -> tuple[str, ...]:
    """The recipes that ``recipe=`` takes: the modules of this folder, except those that recipes share."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name not in SHARED)


def quantize(
    model: nn.Module,
    image_shape: ImageShape,
    bits: str | QuantSpec | Mapping[str, Any] = "w4a4",
    *,
    recipe: str | Any = "express",
    budget: str = "quick",
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Report:
    """Quantize a trained classifier without data (or, to compare with, with data: see ``images=``).

    Args:
        model: any classifier called with images (batch, channels, height, width); left untouched.
        image_shape: (channels, height, width) of the images it was trained on.
        bits: bit widths such as "w4a4", a QuantSpec, or those of weights by layer: {"default": "w4a4", "conv1": 8}.
        recipe: one of ``recipes.names()``, or its settings, such as ``recipes.express.Settings(steps=800)``, which then
            take the place of the budget's.
        budget: "quick" for minutes on two CPU cores, "published" for the paper's schedule.
        seed: of all random numbers; the same seed, kind of processor and thread count give the same network.
        device: where to run; None for where the model is.
        progress: show progress bars.
        resume: resume file: progress is saved to it, and resumed from it if it exists.
        **settings: fields of the recipe's ``Settings`` to change, such as ``steps=1000``; ``images=`` with real images
            for the recipes "real" and "calibrate".

    Returns:
        A Report; ``report.model`` is the fake-quantized network in eval mode.

    Raises:
        InputError: an argument cannot be used; the message says which and what to do.
        NonFiniteError: a weight or a loss is NaN or infinite.

    Taught in notebook 07.
    """
    spec = QuantSpec.parse(bits)
    resume = settings.pop("checkpoint", resume)  # its name in the first edition
    chosen = _choose(recipe, "quantize", budget, settings)
    method = chosen.method
    if hasattr(method, "check"):
        method.check(spec, chosen.settings)
    return _run(
        lambda task: method.quantize(task, spec, chosen.settings), chosen, model, image_shape,
        seed=seed, device=device, progress=progress, resume=resume, spec=spec,
    )  # fmt: skip


def distill(
    model: nn.Module,
    student: nn.Module,
    image_shape: ImageShape,
    *,
    recipe: str | Any = "dfqf",
    budget: str = "quick",
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Report:
    """Distill a trained classifier into a smaller network, without data.

    Args:
        model: the teacher; left untouched.
        student: an untrained network with as many classes; left untouched, its trained copy is ``report.model``.
        image_shape: (channels, height, width) of the images the teacher was trained on.
        recipe: one that can distill, such as "dfqf".
        budget, seed, device, progress, resume, settings: as for ``quantize``.

    Raises:
        InputError, NonFiniteError: as ``quantize``.

    Taught in notebook 05.
    """
    resume = settings.pop("checkpoint", resume)
    chosen = _choose(recipe, "distill", budget, settings)
    report = _run(
        lambda task: chosen.method.distill(task, _fresh_student(student, task), chosen.settings), chosen, model,
        image_shape, seed=seed, device=device, progress=progress, resume=resume, student=type(student).__name__,
    )  # fmt: skip
    report.model = convolution.restore(report.model, student)
    return report


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A recipe with its settings."""

    recipe: str
    budget: str
    method: ModuleType
    settings: Any


def _run(
    work: Callable[[Task], Outcome],
    chosen: _Choice,
    model: nn.Module,
    image_shape: ImageShape,
    *,
    seed: int,
    device: str | torch.device | None,
    progress: bool,
    resume: str | os.PathLike[str] | None,
    **subject: Any,
) -> Report:
    """Check the arguments, do the work on a frozen copy of the model, and report how to run it again."""
    started = time.perf_counter()
    check_network(model, "model")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        raise InputError(f"seed={seed!r} must be a whole number from 0 to 2^31 - 1")
    place = usable_device(device, model)
    teacher, classes = prepare_teacher(model, image_shape, place)
    if chosen.method.NEEDS_BATCHNORM:
        base.require_batchnorm(teacher, chosen.recipe)
    if "spec" in subject:
        coverage = quantizer.coverage(quantizer.quantize_layers(teacher, subject["spec"]), image_shape)
        if coverage.floating_share > quantizer.LOUD:
            warnings.warn(f"model: {coverage}", stacklevel=3)
    described = {
        "recipe": chosen.recipe,
        "budget": chosen.budget,
        "seed": seed,
        "model": f"{type(model).__name__} {_fingerprint(model)}",
        "image_shape": list(image_shape),
        **subject,
        **given.described(chosen.settings),
    }
    identity = {name: repr(value) for name, value in described.items()}
    session = Session(seed, progress, None if resume is None else Path(resume), identity=identity)
    bf16 = getattr(chosen.settings, "bf16", False) and machine.has_bfloat16(place)
    settings = {
        **described,
        "device": str(place),
        "processor": machine.processor(place),
        "dtype": "bfloat16" if bf16 else "float32",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a plain string, which a file can hold without code
        "python": platform.python_version(),
    }
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), convolution.guarded():
        outcome = work(Task(teacher, image_shape, classes, session))
    for network in (outcome.model, outcome.calibrated):
        if network is not None:
            network.eval().requires_grad_(False)
    return Report(
        model=outcome.model,
        images=outcome.images,
        history=session.history,
        seconds=time.perf_counter() - started,
        settings=settings,
        calibrated=outcome.calibrated,
        interrupted=session.interrupted,
        steps=session.steps,
        teacher=teacher,
    )


def _fingerprint(model: nn.Module) -> str:
    """Digest of a network's weights: a run must not be resumed with another network of the same settings."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _choose(recipe: Any, verb: str, budget: str, changes: dict[str, Any]) -> _Choice:
    """The recipe, given by name or by its settings."""
    if isinstance(recipe, str | type) or not dataclasses.is_dataclass(recipe):
        return _Choice(str(recipe), budget, *find(str(recipe), verb, budget, changes))
    room, _, name = type(recipe).__module__.rpartition(".")
    if room != __name__ or name not in names():
        raise InputError(f"recipe={type(recipe).__name__} is of no recipe; give such as recipes.express.Settings()")
    method, _ = find(name, verb, "quick", {})
    return _Choice(name, "settings", method, override(recipe, changes, name))


def find(recipe: str, verb: str, budget: str, changes: dict[str, Any]) -> tuple[ModuleType, Any]:
    """The module of a recipe that can do ``verb`` ("quantize" or "distill"), and its settings with the changes.

    Raises:
        InputError: unknown recipe, budget or setting, a value out of range, or a recipe that does something else.
    """
    if recipe not in names():
        close = difflib.get_close_matches(str(recipe), names(), 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(f'recipe="{recipe}" is unknown; {hint}known are {", ".join(names())}')
    method = importlib.import_module(f"dfqlib.recipes.{recipe}")
    if not hasattr(method, verb):
        able = [name for name in names() if hasattr(importlib.import_module(f"dfqlib.recipes.{name}"), verb)]
        raise InputError(f'recipe="{recipe}" cannot {verb}; those that can are {", ".join(able)}')
    if budget not in method.BUDGETS:
        raise InputError(f'budget="{budget}" is unknown; known are {", ".join(method.BUDGETS)}')
    return method, override(method.BUDGETS[budget], changes, recipe)


def usable_device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    """The device of that name if tensors can be made there, or the model's own for None; InputError otherwise."""
    if device is None:
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'device="{device}" is not available here; use "cpu"') from error


def _fresh_student(student: nn.Module, task: Task) -> nn.Module:
    check_network(student, "student")
    prepared, classes = prepare_teacher(student, task.image_shape, task.device)
    if classes != task.classes:
        raise InputError(f"student has {classes} classes and the teacher {task.classes}; give them the same number")
    return prepared.requires_grad_(True)
