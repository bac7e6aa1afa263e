"""Needed wherever torch and torchvision come from different indexes: a CPU-only torch, torchvision from PyPI.

torchvision's compiled operators then do not load, and importing it fails although all that this library needs of it
(datasets, transforms, models) is pure Python: only the registration of fake kernels for these operators is in the way.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


def import_torchvision() -> ModuleType:
    """Import torchvision, with or without its compiled operators.

    Where the operators load, this is ``import torchvision`` and nothing else. Where they do not,
    ``torchvision.ops.nms`` and ``torchvision.io.read_image`` stay unusable and the rest works.

    Returns:
        The ``torchvision`` module.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision fails to import for any other reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    # The failed attempt leaves half-imported submodules behind, which the second would take for whole ones.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    with _no_fake_kernels("torchvision::"):
        return importlib.import_module("torchvision")


@contextmanager
def _no_fake_kernels(prefix: str) -> Iterator[None]:
    """Let ``torch.library.register_fake`` ignore operators whose name starts with ``prefix``.

    Defining the operators instead would abort the process where the compiled ones load later.
    """
    register_fake = torch.library.register_fake

    def skipping(op: Any, func: Callable | None = None, /, **options: Any) -> Any:
        if not str(op).startswith(prefix):
            return register_fake(op, func, **options)
        return func if func is not None else lambda kernel: kernel

    torch.library.register_fake = skipping
    try:
        yield
    finally:
        torch.library.register_fake = register_fake
