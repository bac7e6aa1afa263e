"""Recipes that take real images: the ceiling of fine-tuning, and calibration alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfqlib
from dfqlib import clipping, quantizer
from dfqlib.errors import InputError, NonFiniteError
from dfqlib.network.inference import Batches
from dfqlib.recipes import calibrate, express, given, real
from dfqlib.recipes.base import Report
from dfqlib.training.task import Task

SHAPE = (1, 16, 16)
TINY: dict[str, Any] = {"real": {"steps": 4, "batch": 4}, "calibrate": {}}


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Images of the digits' training set: real ones, which evaluation does not see."""
    return dfqlib.data.images_and_labels(dfqlib.load_data("digits", "train"))[0]


def run(teacher: nn.Module, recipe: str, bits: str = "w2a2", **settings: Any) -> Report:
    return dfqlib.quantize(teacher, SHAPE, bits, recipe=recipe, progress=False, **settings)


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_real_images_are_the_ceiling(teacher: nn.Module, digits: Batches, photos: Tensor) -> None:
    report = run(teacher, "real", images=photos, steps=80)
    assert report.calibrated is not None
    assert dfqlib.evaluate(report.model, digits) >= 90
    assert dfqlib.evaluate(report.calibrated, digits) <= 40
    assert [row["phase"] for row in report.history] == ["fine-tuning"] * 8


def test_real_is_express_from_calibration_on(teacher: nn.Module) -> None:
    """Given the images that express makes, it does what express does, bit for bit."""
    short = {"steps": 6, "batch": 8}
    ours = run(teacher, "express", images=16, synthesis_steps=3, **short)
    theirs = run(teacher, "real", images=ours.images, **short)
    assert same(ours.model, theirs.model)
    shared = set(vars(express.Settings())) & set(vars(real.Settings())) - {"images"}
    assert shared >= {"steps", "lr", "step_lr", "cutmix", "integer_share", "bf16"}
    for budget in ("quick", "published"):
        assert all(getattr(real.BUDGETS[budget], n) == getattr(express.BUDGETS[budget], n) for n in shared)
        assert real.BUDGETS[budget].calibration_images == express.BUDGETS[budget].images


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_calibrate_is_express_without_fine_tuning(teacher: nn.Module, share: float) -> None:
    ours = run(teacher, "calibrate", images=16, synthesis_steps=3)
    theirs = run(teacher, "express", images=16, synthesis_steps=3, steps=0, integer_share=share)
    assert theirs.calibrated is not None
    assert torch.equal(ours.images, theirs.images)
    assert same(ours.model, theirs.calibrated)
    assert ours.model is ours.calibrated
    for budget in ("quick", "published"):
        settings = calibrate.BUDGETS[budget]
        assert isinstance(settings.images, int)
        made, express_settings = settings.synthesis(), express.BUDGETS[budget]
        for name in ("images", "synthesis_steps", "synthesis_lr", "label_weight", "shift", "flip", "bf16"):
            assert getattr(made, name) == getattr(express_settings, name)


def test_the_criterion_sets_every_threshold(teacher: nn.Module, photos: Tensor) -> None:
    steps = {}
    for clip in clipping.METHODS:
        report = run(teacher, "calibrate", images=photos[:64], clip=clip)
        steps[clip] = torch.stack([q.step.detach().max() for _, q in quantizer.quantizers(report.model)])
        weight = teacher.get_parameter("layer2.0.conv1.weight")
        q: Any = report.model.get_submodule("layer2.0.conv1.weight_quantizer")
        assert float(q.step) == pytest.approx(clipping.threshold(weight, 2, clip) / q.qmax, rel=1e-5)
    assert all((steps["max"] >= steps[clip] - 1e-6).float().mean() > 0.5 for clip in clipping.METHODS)
    assert len({tuple(values.tolist()) for values in steps.values()}) == len(clipping.METHODS)


def test_ranges_come_from_images_of_every_class(photos: Tensor) -> None:
    """A folder's images come sorted by class: the first few would be of one."""
    sorted_by_class = torch.arange(1000).float().reshape(1000, 1, 1, 1)
    some = given.spread(sorted_by_class, 10)
    assert some.flatten().tolist() == [100.0 * n for n in range(10)]
    assert torch.equal(given.spread(photos[:5], 10), photos[:5])


@pytest.mark.parametrize("recipe", ["real", "calibrate"])
def test_the_report_describes_the_images_and_holds_no_copy(
    teacher: nn.Module, photos: Tensor, recipe: str, tmp_path: Path
) -> None:
    report = run(teacher, recipe, images=photos[:8], **TINY[recipe])
    plain = {name: value for name, value in report.settings.items() if name != "spec"}
    json.dumps(plain)
    assert report.settings["images"].startswith("8x1x16x16 torch.float32 ")
    assert torch.equal(report.images, photos[:8])
    other = run(teacher, recipe, images=photos[:8] + 1e-6, **TINY[recipe])
    assert other.settings["images"] != report.settings["images"]
    saved = dfqlib.load_quantized(dfqlib.save_quantized(report, tmp_path / "q.pt", arch="digits_resnet8"))
    assert same(saved, report.model)


def test_a_checkpoint_of_other_images_is_refused(teacher: nn.Module, photos: Tensor, tmp_path: Path) -> None:
    settings = {**TINY["real"], "checkpoint": tmp_path / "run.pt"}
    first = run(teacher, "real", images=photos[:8], **settings)
    assert same(first.model, run(teacher, "real", images=photos[:8].clone(), **settings).model)
    with pytest.raises(InputError, match=r"is of a run with images='8x1x16x16 .*, now images='8x1x16x16 "):
        run(teacher, "real", images=photos[8:16], **settings)


@pytest.mark.parametrize("recipe", ["real", "calibrate"])
def test_networks_without_batchnorm_will_do(recipe: str, photos: Tensor) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    report = run(plain, recipe, images=photos[:8], **TINY[recipe])
    assert report.images.shape == (8, *SHAPE)
    with pytest.raises(InputError, match=r"reads BatchNorm statistics and model has none: .*images= 'calibrate' or"):
        run(plain, "calibrate")


def test_images_and_settings_are_left_as_they_are(teacher: nn.Module, photos: Tensor) -> None:
    before = photos[:8].clone()
    settings = real.Settings(images=before, **TINY["real"])
    run(teacher, "real", images=before, **TINY["real"])
    assert torch.equal(before, photos[:8])
    assert settings != real.Settings(images=before + 1, **TINY["real"])  # comparing must not compare pixels


def test_real_without_images_says_what_to_give(teacher: nn.Module) -> None:
    with pytest.raises(InputError, match=r"got none: give images=, a float tensor .*images_and_labels.*\"express\""):
        run(teacher, "real")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([1, 2], InputError, "images=list must be a float tensor"),
        (torch.zeros(16, 16), InputError, r"of shape \(16, 16\) must be a float tensor \(N, C, H, W\)"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), InputError, "images: torch.uint8 of shape"),
        (torch.zeros(0, 1, 16, 16), InputError, r"of shape \(0, 1, 16, 16\)"),
        (torch.full((2, 1, 16, 16), torch.nan), NonFiniteError, "images: some pixels are NaN"),
        (torch.zeros(2, 3, 16, 16), InputError, r"each has shape \(3, 16, 16\), image_shape=\(1, 16, 16\)"),
    ],
)
def test_images_that_cannot_be_used_are_refused(
    images: Any, error: type[InputError], message: str, teacher: nn.Module
) -> None:
    with pytest.raises(error, match=message):
        run(teacher, "real", images=images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 1}, "images=1 must be a whole number of at least 2"),
        ({"images": "many"}, "images='many' must be a whole number"),
        ({"clip": "least"}, "clip='least' must be"),
        ({"synthesis_steps": 0}, "synthesis_steps=0 must be"),
    ],
)
def test_calibrate_refuses_what_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate.Settings(**changes)


def test_given_images_arrive_in_float32_on_the_device(task: Task) -> None:
    assert given.take(task, torch.zeros(2, *SHAPE, dtype=torch.float64)).dtype == torch.float32
