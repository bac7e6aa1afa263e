"""What every test shares: one thread, one seed, and the folders of real data where they exist."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dfqlib
from dfqlib.network.inference import Batches
from dfqlib.recipes.base import prepare_teacher
from dfqlib.training import Session
from dfqlib.training.task import Task

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One thread and fixed seeds, so that a test gives the same figures alone and in company."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and public checkpoints: the folder that DFQLIB_DATA names, else ../shared/data."""
    path = Path(os.environ.get("DFQLIB_DATA") or SHARED / "data")
    if not path.is_dir():
        pytest.skip(f"real data absent: no folder {path} (set DFQLIB_DATA to one)")
    return path


@pytest.fixture(scope="session")
def reference() -> Path:
    """Values computed with the methods' released code: official.npz and official.json."""
    path = SHARED / "reference"
    if not (path / "official.npz").is_file():
        pytest.skip(f"reference values absent: no {path / 'official.npz'}")
    return path


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """The bundled digits classifier; a module that works on another network defines its own."""
    return dfqlib.load_model("digits_resnet8")


@pytest.fixture(scope="module")
def digits() -> Batches:
    """The digits' test images and labels."""
    return dfqlib.load_data("digits")


@pytest.fixture
def task(teacher: nn.Module) -> Task:
    """A recipe's job on the digits, without a progress bar."""
    shape = (1, 16, 16)
    frozen, classes = prepare_teacher(teacher, shape, torch.device("cpu"))
    return Task(frozen, shape, classes, Session(progress=False))
