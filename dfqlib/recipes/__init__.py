"""One system, one file, each reading like its paper's algorithm box; ``quantize`` and ``distill`` run them by name.

A recipe is a module with ``Settings`` (a frozen dataclass), ``BUDGETS`` (settings by budget), ``NEEDS_BATCHNORM`` and
``quantize(task, spec, settings)``, and where the method distils, ``distill(task, student, settings)``. Where widths and
settings can contradict each other, ``check(spec, settings)`` refuses that before any work.
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
from collections.abc import Mapping
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


def names() -> tuple[str, ...]:
    """The recipes that ``recipe=`` takes: the files of this folder, but for what they share."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("base", "given"))


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
        bits: widths such as "w4a4", a QuantSpec, or weight widths by layer: {"default": "w4a4", "conv1": 8}.
        recipe: one of ``recipes.names()``, or its settings, such as ``recipes.express.Settings(steps=800)``, which then
            stand for a budget.
        budget: "quick" for minutes on two CPU cores, "published" for the paper's schedule.
        seed: everything random follows from it; the same seed, device and thread count give the same bits.
        device: where to run; None for where the model is.
        progress: show progress bars.
        resume: file to save progress to and to resume from.
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
    recipe, budget, method, chosen = _chosen(recipe, "quantize", budget, settings)
    if hasattr(method, "check"):
        method.check(spec, chosen)
    run = _Run(model, image_shape, recipe, budget, seed, device, progress, resume, method, chosen, {"spec": spec})
    return run(lambda task: method.quantize(task, spec, chosen))


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
    """Train a smaller network to do what a trained classifier does, without data.

    Args:
        model: the teacher; left untouched.
        student: an untrained network with as many classes; left untouched, its trained copy is ``report.model``.
        image_shape: (channels, height, width) of the images the teacher was trained on.
        recipe: one that distils, such as "dfqf".
        budget, seed, device, progress, resume, settings: as for ``quantize``.

    Raises:
        InputError, NonFiniteError: as ``quantize``.

    Taught in notebook 05.
    """
    resume = settings.pop("checkpoint", resume)
    recipe, budget, method, chosen = _chosen(recipe, "distill", budget, settings)
    kind = {"student": type(student).__name__}
    run = _Run(model, image_shape, recipe, budget, seed, device, progress, resume, method, chosen, kind)
    report = run(lambda task: method.distill(task, _fresh_student(student, task), chosen))
    report.model = convolution.restore(report.model, student)
    return report


@dataclasses.dataclass(frozen=True)
class _Run:
    """Everything around a recipe: checks, seed, threads, time, and the record of how to run it again."""

    model: nn.Module
    image_shape: ImageShape
    recipe: str
    budget: str
    seed: int
    device: str | torch.device | None
    progress: bool
    resume: str | os.PathLike[str] | None
    method: ModuleType
    chosen: Any
    subject: dict[str, Any]

    def __call__(self, work: Any) -> Report:
        started = time.perf_counter()
        check_network(self.model, "model")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**31:
            raise InputError(f"seed={self.seed!r} must be a whole number from 0 to 2^31 - 1")
        device = usable_device(self.device, self.model)
        teacher, classes = prepare_teacher(self.model, self.image_shape, device)
        if self.method.NEEDS_BATCHNORM:
            base.require_batchnorm(teacher, self.recipe)
        self._say_what_stays_in_float(teacher)
        settings = self._record(device)
        path = None if self.resume is None else Path(self.resume)
        session = Session(self.seed, self.progress, path, identity=_identity(settings))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), convolution.guarded():
            outcome: Outcome = work(Task(teacher, self.image_shape, classes, session))
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

    def _say_what_stays_in_float(self, teacher: nn.Module) -> None:
        spec = self.subject.get("spec")
        if spec is None:
            return
        network = quantizer.quantize_layers(teacher, spec)
        found = quantizer.coverage(network, self.image_shape)
        if found.floating_share > quantizer.LOUD:
            warnings.warn(f"model: {found}", stacklevel=4)

    def _record(self, device: torch.device) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "budget": self.budget,
            "seed": self.seed,
            "model": f"{type(self.model).__name__} {_fingerprint(self.model)}",
            "image_shape": list(self.image_shape),
            **self.subject,
            **given.described(self.chosen),
            "device": str(device),
            "processor": machine.processor(device),
            "dtype": "bfloat16" if getattr(self.chosen, "bf16", False) and machine.has_bfloat16(device) else "float32",
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),  # a plain string, which a file can hold without code
            "python": platform.python_version(),
        }


def _identity(settings: dict[str, Any]) -> dict[str, str]:
    ignored = {"device", "processor", "dtype", "threads", "torch", "python"}
    return {name: repr(value) for name, value in settings.items() if name not in ignored}


def _fingerprint(model: nn.Module) -> str:
    """Of a network's weights: a checkpoint must not be resumed with another network of the same settings."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _chosen(recipe: Any, verb: str, budget: str, changes: dict[str, Any]) -> tuple[str, str, ModuleType, Any]:
    """Name, budget, module and settings of a recipe, given by name or by its settings."""
    if isinstance(recipe, str | type) or not dataclasses.is_dataclass(recipe):
        method, chosen = find(str(recipe), verb, budget, changes)
        return str(recipe), budget, method, chosen
    room, _, name = type(recipe).__module__.rpartition(".")
    if room != __name__ or name not in names():
        raise InputError(f"recipe={type(recipe).__name__} is of no recipe; give such as recipes.express.Settings()")
    method, _ = find(name, verb, "quick", {})
    return name, "settings", method, override(recipe, changes, name)


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
