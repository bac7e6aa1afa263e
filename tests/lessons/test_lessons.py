"""What a lesson's parameters open, and what they say when they cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dfqlib
from dfqlib import lessons, losses, models
from dfqlib.errors import InputError
from dfqlib.recipes import express
from dfqlib.spec import QuantSpec

TINY = replace(express.BUDGETS["quick"], images=20, synthesis_steps=3, steps=3, batch=8)


@pytest.fixture(scope="module")
def digits() -> lessons.Subject:
    return lessons.open_subject("digits")


def make_folder(path: Path, classes: tuple[str, ...], images: int = 2, size: int = 32) -> Path:
    noise = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True)
        for index in range(images):
            Image.fromarray(noise.integers(0, 256, (size, size, 3), np.uint8)).save(path / name / f"{index}.png")
    return path


def make_checkpoint(path: Path) -> Path:
    torch.save(models.info("cifar10_resnet20").build().state_dict(), path)
    return path


def test_the_digits_open_with_nothing_else_said(digits: lessons.Subject) -> None:
    assert digits.info.name == "digits_resnet8"
    assert sum(len(labels) for _, labels in digits.test) == 500
    assert dfqlib.evaluate(digits.teacher, digits.test) > 98


def test_a_folder_with_cifar10s_classes_means_its_network(tmp_path: Path) -> None:
    classes = models.info("cifar10_resnet20").classes
    make_folder(tmp_path / "test", classes)
    make_folder(tmp_path / "train", classes, images=3)
    subject = lessons.open_subject(f"folder:{tmp_path}/test", checkpoint=str(make_checkpoint(tmp_path / "mine.pt")))
    assert subject.info.name == "cifar10_resnet20"
    real = lessons.real_images(subject, f"folder:{tmp_path}/test", 10)
    assert real is not None
    assert real.shape == (10, 3, 32, 32)


def test_a_registered_checkpoints_file_name_decides() -> None:
    assert lessons.choose_arch("cifar10", "somewhere/resnet56-4bfd9763.th") == "cifar10_resnet56"
    assert lessons.choose_arch("cifar10", "") == "cifar10_resnet20"


def test_a_folder_without_a_train_beside_it_has_no_real_images(digits: lessons.Subject, tmp_path: Path) -> None:
    assert lessons.real_images(digits, f"folder:{tmp_path}", 10) is None


def test_real_images_are_spread_over_the_classes(digits: lessons.Subject) -> None:
    real = lessons.real_images(digits, "digits", 100)
    assert real is not None
    with torch.no_grad():
        assert len(digits.teacher(real).argmax(1).unique()) == 10


def test_images_from_noise_start_alike_whatever_the_objective(digits: lessons.Subject) -> None:
    def statistics(images, logits, probe, labels):
        return {"loss": losses.bn_norm_loss(probe)}

    before = torch.get_rng_state()
    labels = torch.arange(12)
    noise, _ = lessons.from_noise(digits, statistics, labels, 0, seed=3)
    made, history = lessons.from_noise(digits, statistics, labels, 20, seed=3)
    other, _ = lessons.from_noise(digits, lambda *_: {"loss": _[0].square().mean()}, labels, 1, seed=3)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert (made - noise).abs().max() > 0.2 > 0.11 > (other - noise).abs().max()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in digits.teacher.parameters())


def test_tuning_a_reports_images_gives_its_network_again_bit_for_bit(digits: lessons.Subject) -> None:
    changes = {"images": 20, "synthesis_steps": 3, "steps": 3, "batch": 8}
    report = dfqlib.quantize(digits.teacher, (1, 16, 16), "w2a2", seed=3, progress=False, **changes)
    again = lessons.tune(digits, report.images, QuantSpec(2, 2), TINY, seed=3)
    for one, two in ((report.model, again.model), (report.calibrated, again.calibrated)):
        assert one is not None
        states = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)


def test_no_steps_leave_the_calibrated_network(digits: lessons.Subject) -> None:
    made = torch.randn(20, 1, 16, 16)
    tuned = lessons.tune(digits, made, QuantSpec(3, 3), replace(TINY, steps=0), method="max")
    with torch.no_grad():
        assert torch.equal(tuned.model(made), tuned.calibrated(made))


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    odd = make_folder(tmp_path / "odd", ("cat", "unicorn"))
    small = make_folder(tmp_path / "small", models.info("cifar10_resnet20").classes, size=16)
    weights = str(make_checkpoint(tmp_path / "mine.pt"))
    cases = {
        ("digits", 7): "arch=7 must be text",
        ("digts", ""): 'dataset="digts" is unknown; known are digits',
        ("svhn", ""): "set arch to one of digits_resnet8",
        ("folder:no/such/folder", ""): "relative path starts in the lesson's folder",
        ("digits", "", "no/such/file.pt"): 'checkpoint: "no/such/file.pt" does not exist',
        (f"folder:{odd}", "", weights): "does not say which network",
        (f"folder:{odd}", "cifar10_resnet20", weights): "unicorn",
        (f"folder:{small}", "", weights): r"images of shape \(3, 16, 16\)",
        ("digits", "cifar10_resnet20", weights): "mean=",
    }
    for arguments, message in cases.items():
        with pytest.raises(InputError, match=message):
            lessons.open_subject(*arguments)  # type: ignore[arg-type]
