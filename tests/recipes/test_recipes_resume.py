"""Ctrl-C in the middle of any phase, and the same call again: the result has every bit of an unbroken run.

Express with its options is in ``test_recipes_express``.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfqlib
from dfqlib.recipes import gdfq
from dfqlib.recipes.base import Report
from dfqlib.training import Session
from dfqlib.training.session import Step

SHAPE = (1, 16, 16)
GENERATOR: dict[str, Any] = {"warm_up_epochs": 1, "epochs": 1, "iterations": 2, "batch": 4, "latent": 16}
QUANTIZE: dict[str, dict[str, Any]] = {
    "zeroq": {"images": 8, "iterations": 4},
    "gdfq": {
        "bits": gdfq.paper_spec("w4a4"), "epochs": 2, "warm_up_epochs": 2, "range_epochs": 2, "iterations": 2,
        "batch": 4,
    },
    "dfqf": {"epochs": 2, "warm_up_epochs": 2, "iterations": 2, "batch": 4, "latent": 50},
    "dsg": {"images": 9, "gaussian_images": 8, "iterations": 2, "steps": 2, "batch": 4},
    "deepinversion": {"images": 4, "synthesis_batch": 2, "synthesis_steps": 2, "steps": 2, "batch": 4},
    "dafl": GENERATOR,
    "dfad": {**GENERATOR, "student_steps": 2},
    "akd": {**GENERATOR, "iterations": 4, "student_steps": 2, "generators": 2, "students": 2},
}  # fmt: skip
DISTILL: dict[str, dict[str, Any]] = {
    "dfqf": {"distill_epochs": 1, "iterations": 2, "batch": 4, "latent": 16},
    "dfad": {"distill_epochs": 1, "iterations": 2, "batch": 4, "latent": 16, "schedule": "step"},
}


class Plain(nn.Sequential):
    """A student of the digits' shape."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


def press_ctrl_c_halfway(patch: pytest.MonkeyPatch, phase: str) -> None:
    loop = Session.loop

    def interrupted(self: Session, name: str, steps: int, step: Step, *rest: Any, **more: Any) -> None:
        def pressed(index: int) -> Any:
            if name == phase and index == steps // 2 - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return step(index)

        loop(self, name, steps, pressed, *rest, **more)

    patch.setattr(Session, "loop", interrupted)


def assert_same(one: Report, other: Report) -> None:
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(one.images, other.images)


@pytest.mark.parametrize(
    ("recipe", "phase"),
    [
        ("zeroq", "synthesis"),
        ("gdfq", "warm-up"),
        ("gdfq", "fine-tuning"),
        ("dfqf", "warm-up"),
        ("dfqf", "fine-tuning"),
        ("dsg", "synthesis"),
        ("dsg", "fine-tuning"),
        ("deepinversion", "synthesis 2/2"),
        ("deepinversion", "fine-tuning 1"),
        ("deepinversion", "synthesis 4/4"),
        ("dafl", "warm-up"),
        ("dafl", "fine-tuning"),
        ("dfad", "warm-up"),
        ("dfad", "fine-tuning"),
        ("akd", "warm-up"),
        ("akd", "fine-tuning"),
    ],
)
def test_quantization(
    teacher: nn.Module, recipe: str, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**resume: Path) -> Report:
        return dfqlib.quantize(teacher, SHAPE, recipe=recipe, progress=False, **QUANTIZE[recipe], **resume)

    with monkeypatch.context() as patch:
        press_ctrl_c_halfway(patch, phase)
        broken = run(resume=tmp_path / "run.pt")
    assert broken.interrupted
    assert broken.history[-1]["phase"] == phase
    assert_same(run(resume=tmp_path / "run.pt"), run())


@pytest.mark.parametrize("recipe", DISTILL)
def test_distillation(teacher: nn.Module, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Plain()

    def run(**resume: Path) -> Report:
        return dfqlib.distill(teacher, student, SHAPE, recipe=recipe, progress=False, **DISTILL[recipe], **resume)

    with monkeypatch.context() as patch:
        press_ctrl_c_halfway(patch, "distillation")
        assert run(resume=tmp_path / "run.pt").interrupted
    assert_same(run(resume=tmp_path / "run.pt"), run())
