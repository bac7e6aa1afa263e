"""Express and the later papers' ideas in it: each changes the result, is off by default, and does what it says."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfqlib
from dfqlib import losses, quantizer, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.network.inference import predict
from dfqlib.recipes import express, real
from dfqlib.recipes.base import Report
from dfqlib.training import additions, augment, distillation
from dfqlib.training.task import Task, calibrated_student

SHAPE = (1, 16, 16)
TINY: dict[str, Any] = {"images": 12, "synthesis_steps": 4, "steps": 4, "batch": 8, "progress": False}
FLAGS: dict[str, dict[str, float]] = {
    "superposed": {"superposed": 0.4},
    "hard_samples": {"hard_samples": 10.0},
    "perturbation": {"perturbation": 0.01},
    "alignment": {"alignment": 50.0},
    "adaptability": {"adaptability": 1.0},
    "low_pass": {"low_pass": 0.25},
    "selective_labels": {"selective_labels": 1.0, "student_label_weight": 0.5},
}
IN_FINE_TUNING = {"perturbation", "alignment", "selective_labels"}


def run(teacher: nn.Module, **changes: Any) -> Report:
    return dfqlib.quantize(teacher, SHAPE, "w2a2", **{**TINY, **changes})


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def plain(teacher: nn.Module) -> Report:
    torch.set_num_threads(1)  # made before the fixture that sets it for each test
    return run(teacher)


@pytest.mark.parametrize("flag", FLAGS)
def test_each_idea_changes_what_it_is_about_and_repeats(teacher: nn.Module, plain: Report, flag: str) -> None:
    report = run(teacher, **FLAGS[flag])
    assert not same(report.model, plain.model)
    assert torch.equal(report.images, plain.images) == (flag in IN_FINE_TUNING)
    assert report.images.shape == plain.images.shape
    assert torch.isfinite(report.images).all()
    assert report.settings[flag] == FLAGS[flag][flag]
    assert same(run(teacher, **FLAGS[flag]).model, report.model)


def test_of_images_that_stay_as_they_are_the_teacher_is_asked_once(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses_of(**changes: Any) -> list[float]:
        return [row["loss"] for row in run(teacher, shift=0, flip=False, bf16=False, **changes).history]

    once = losses_of(cutmix=0.0)
    assert losses_of(cutmix=0.0, perturbation=1e-30) == pytest.approx(once, rel=1e-4)  # asked at each step
    monkeypatch.setattr(distillation, "predict", lambda network, images: -predict(network, images))
    assert losses_of(cutmix=0.0)[-1] > 1.5 * once[-1]
    with_mixtures = losses_of(cutmix=1.0)
    monkeypatch.undo()
    assert losses_of(cutmix=1.0) == with_mixtures


def test_all_ideas_are_off_by_default_in_every_budget_and_go_together(teacher: nn.Module) -> None:
    assert all(getattr(settings, flag) == 0 for settings in express.BUDGETS.values() for flag in FLAGS)
    everything = {name: value for flag in FLAGS.values() for name, value in flag.items()}
    report = run(teacher, **everything, integer_share=0.5)
    assert all(math.isfinite(row["loss"]) for row in report.history)
    assert not any(module._forward_hooks for module in report.model.modules())


def test_a_run_with_everything_is_resumed_where_it_stopped(teacher: nn.Module, tmp_path: Any) -> None:
    everything = {name: value for flag in FLAGS.values() for name, value in flag.items()}
    whole = run(teacher, **everything, resume=tmp_path / "run.pt")
    again = run(teacher, **everything, resume=tmp_path / "run.pt")
    assert same(whole.model, again.model)
    assert torch.equal(whole.images, again.images)
    assert whole.history == again.history


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"superposed": 1.5}, "superposed=1.5 must be a number from 0 to 1"),
        ({"hard_samples": -1.0}, "hard_samples=-1.0 must be a number of at least 0"),
        ({"perturbation": -0.01}, "perturbation=-0.01 must be"),
        ({"alignment": "much"}, "alignment='much' must be a number"),
        ({"adaptability": -1}, "adaptability=-1 must be"),
        ({"low_pass": -0.5}, "low_pass=-0.5 must be"),
        ({"selective_labels": 1.1}, "selective_labels=1.1 must be a number from 0 to 1"),
        ({"student_label_weight": -1}, "student_label_weight=-1 must be"),
        ({"superposed": 0.4, "label_weight": 0.0}, "superposed=0.4 is about labels, which label_weight=0"),
        ({"selective_labels": 0.5, "label_weight": 0.0}, "selective_labels=0.5 is about labels"),
        ({"adaptability": 1.0, "images": 3}, "images=3 is too few for adaptability"),
        ({"perturbation": 0.01, "steps": 0}, "perturbation=0.01 acts in fine-tuning, and steps=0"),
        ({"alignment": 50.0, "steps": 0}, "alignment=50.0 acts in fine-tuning"),
        ({"selective_labels": 0.5, "steps": 0}, "selective_labels=0.5 acts in fine-tuning"),
    ],
)
def test_settings_out_of_range_or_at_odds_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        express.Settings(**changes)


def test_what_is_at_odds_only_apart_is_accepted() -> None:
    express.Settings(superposed=0.4, label_weight=0.0, hard_samples=10.0)
    express.Settings(label_weight=0.0)
    express.Settings(steps=0)
    with pytest.raises(InputError, match=r"perturbation=0.01 acts in fine-tuning"):
        real.Settings(perturbation=0.01, steps=0)


# Superposed labels


@pytest.mark.parametrize(("classes", "mixed"), [(2, 2), (10, 2), (100, 10)])
def test_mixtures_are_of_a_tenth_of_the_classes_with_the_own_among_them(classes: int, mixed: int) -> None:
    labels = synthesis.balanced_labels(500, classes)
    rows = additions.superposed_labels(labels, classes, 1.0, seed=0)
    torch.testing.assert_close(rows.sum(1), torch.ones(500))
    assert (rows > 0).sum(1).tolist() == [mixed] * 500
    assert bool((rows.gather(1, labels.unsqueeze(1)) > 0).all())
    assert abs(float(rows.mean(0).std())) < 0.5 / classes  # no class is favored


def test_the_share_says_how_many_labels_are_mixed() -> None:
    labels = synthesis.balanced_labels(1000, 10)
    rows = additions.superposed_labels(labels, 10, 0.4, seed=0)
    single = rows.max(1).values == 1
    assert 0.55 < float(single.float().mean()) < 0.65
    assert torch.equal(rows[single].argmax(1), labels[single])
    assert torch.equal(rows, additions.superposed_labels(labels, 10, 0.4, seed=0))
    assert not torch.equal(rows, additions.superposed_labels(labels, 10, 0.4, seed=1))


def test_superposed_images_lie_between_classes(teacher: nn.Module, task: Task) -> None:
    between = express.Settings(images=20, synthesis_steps=60, superposed=1.0, label_weight=2.0)
    single = express.Settings(images=20, synthesis_steps=60, label_weight=2.0)
    mixtures = express.wanted_labels(task, 20, between)
    logits = [predict(teacher, express.synthesize(task, settings)) for settings in (between, single)]
    near, far = (float(losses.difficulty(shown, mixtures).mean()) for shown in logits)
    assert near < far
    assert float(losses.sample_entropy(logits[0])) > float(losses.sample_entropy(logits[1]))


# Hard samples


def test_hard_samples_stay_harder(teacher: nn.Module, task: Task) -> None:
    def mean_difficulty(**changes: float) -> float:
        settings = express.Settings(images=20, synthesis_steps=60, **changes)  # type: ignore[arg-type]
        logits = predict(teacher, express.synthesize(task, settings))
        return float(losses.difficulty(logits, synthesis.balanced_labels(20, 10)).mean())

    assert mean_difficulty(hard_samples=1.0) > mean_difficulty(label_weight=1.0)


def test_a_perturbation_is_a_step_up_the_loss_of_the_length_given() -> None:
    batch = torch.randn(4, *SHAPE)
    target = torch.randn(4, *SHAPE)

    def loss(images: Tensor) -> Tensor:
        return (images - target).square().sum()

    harder = additions.perturbed(batch, loss, 0.01)
    torch.testing.assert_close((harder - batch).abs(), torch.full_like(batch, 0.01), atol=1e-6, rtol=0)
    assert loss(harder) > loss(batch)
    assert not harder.requires_grad
    assert not batch.requires_grad


def test_features_are_what_leaves_each_batchnorm_layer(task: Task) -> None:
    images = torch.randn(2, *SHAPE)
    with additions.Features(task.teacher) as features, BatchNormProbe(task.teacher) as probe, torch.no_grad():
        task.teacher(images)
        seen, entered = features.take(), list(probe)
        assert features.take() == []
    layers = dict(task.teacher.named_modules())
    for output, layer in zip(seen, entered, strict=True):
        torch.testing.assert_close(output, layers[layer.name](layer.input))
    assert features.take() == []


def test_alignment_brings_the_attention_closer(task: Task) -> None:
    images = torch.randn(16, *SHAPE)
    spec = dfqlib.QuantSpec(2, 2)

    def distance(alignment: float) -> float:
        student = calibrated_student(task, spec, images)
        settings = express.Settings(steps=20, batch=16, cutmix=0.0, shift=0, flip=False, alignment=alignment)
        task.session.history.clear()
        distillation.fine_tune(
            task, student, images, settings, 1e-3, phase=f"alignment {alignment}",
            additions=distillation.Additions(alignment=alignment),
        )  # fmt: skip
        with additions.Features(student) as ours, additions.Features(task.teacher) as theirs, torch.no_grad():
            student(images)
            task.teacher(images)
            return float(losses.attention_loss(ours.take(), theirs.take()))

    assert distance(1000.0) < distance(0.0)


# Steps


def test_a_channels_step_is_put_back_above_its_floor_and_a_whole_tensors_is_not(teacher: nn.Module, task: Task) -> None:
    spec = dfqlib.QuantSpec(2, 2, granularity="channel")
    student = calibrated_student(task, spec, torch.randn(8, *SHAPE))
    steps = [each.step for _, each in quantizer.quantizers(student) if isinstance(each, quantizer.StepQuantizer)]
    before = [step.detach().clone() for step in steps]
    floors = distillation.step_floors(student)
    assert {id(step) for step, _ in floors} == {id(step) for step in steps if step.numel() > 1}
    with torch.no_grad():
        for step in steps:
            step.view(-1)[0] = -1e-5  # as Adam may do to a channel that is all but dead
    distillation.keep_above(floors)
    for step, old in zip(steps, before, strict=True):
        first = float(step.detach().view(-1)[0])
        assert first == pytest.approx(
            distillation.SMALLEST_STEP * float(old.view(-1)[0]) if step.numel() > 1 else -1e-5
        )
        assert torch.equal(step.view(-1)[1:], old.view(-1)[1:])


# Batches


@pytest.mark.parametrize(("batch", "sizes"), [(256, [13]), (6, [5, 5, 3]), (12, [7, 6])])
def test_images_are_made_in_even_batches_of_at_most_that_many(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch, batch: int, sizes: list[int]
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        express,
        "shift_and_flip",
        lambda images, shift, flip: seen.append(len(images)) or images,  # type: ignore[func-returns-value]
    )
    report = run(teacher, images=13, synthesis_batch=batch, synthesis_steps=1, steps=0)
    assert seen == sizes
    assert len(report.images) == 13


# Adaptability


def test_half_of_the_images_is_made_against_the_student(teacher: nn.Module, plain: Report, task: Task) -> None:
    report = run(teacher, adaptability=1.0)
    phases = list(dict.fromkeys(row["phase"] for row in report.history))
    assert phases == ["synthesis", "synthesis 2/2", "fine-tuning"]
    settings = express.Settings(**{k: v for k, v in TINY.items() if k != "progress"}, adaptability=1.0)
    first = express.synthesize(task, settings)
    assert len(first) == 6
    assert torch.equal(report.images[:6], first)
    rival = calibrated_student(task, dfqlib.QuantSpec(2, 2), first)
    before = {name: value.clone() for name, value in rival.state_dict().items()}
    assert torch.equal(report.images[6:], express.synthesize(task, settings, rival))
    assert all(torch.equal(value, before[name]) for name, value in rival.state_dict().items())
    assert all(parameter.grad is None for parameter in rival.parameters())


def test_adaptable_images_have_the_wanted_disagreement(teacher: nn.Module, task: Task) -> None:
    rival = calibrated_student(task, dfqlib.QuantSpec(3, 3), torch.randn(20, *SHAPE))
    labels = synthesis.balanced_labels(40, 10)[20:]

    def unfit(adaptability: float) -> float:
        settings = express.Settings(images=40, synthesis_steps=60, adaptability=adaptability)
        images = express.synthesize(task, settings, rival)
        return float(losses.adaptability_loss(predict(teacher, images), predict(rival, images), labels))

    assert unfit(5.0) < unfit(1e-6)


# Low pass and selective labels


def test_a_blur_is_the_gaussian_that_wraps_around() -> None:
    point = torch.zeros(1, 1, 16, 16)
    point[..., 0, 0] = 1.0
    blurred = augment.low_pass(point, 1.0)
    distance = torch.minimum(torch.arange(16), 16 - torch.arange(16)).float()
    bell = torch.exp(-0.5 * distance.square())
    bell = bell / bell.sum()
    torch.testing.assert_close(blurred[0, 0], bell.outer(bell), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 9, 12), (1, 1, 1, 1)])
def test_a_blur_keeps_the_mean_and_commutes_with_shift_and_flip(shape: tuple[int, ...]) -> None:
    images = torch.randn(*shape)
    blurred = augment.low_pass(images, 0.7)
    assert blurred.shape == images.shape
    torch.testing.assert_close(blurred.mean((2, 3)), images.mean((2, 3)))
    moved = images.roll((1, 2), (2, 3)).flip(3)
    torch.testing.assert_close(augment.low_pass(moved, 0.7), blurred.roll((1, 2), (2, 3)).flip(3))
    torch.testing.assert_close(augment.low_pass(images, 0.0), images)


def test_a_blur_is_synqs_filter() -> None:
    """exp(-D^2 / (2 D0^2)) of a wave with D periods in an image."""
    waves, cutoff = 5, 20.0
    wave = torch.cos(2 * math.pi * waves * torch.arange(32) / 32).repeat(1, 1, 32, 1)
    blurred = augment.low_pass(wave, 32 / (2 * math.pi * cutoff))
    torch.testing.assert_close(blurred, wave * math.exp(-(waves**2) / (2 * cutoff**2)))


def test_calibration_and_fine_tuning_see_the_blurred_images(plain: Report, teacher: nn.Module) -> None:
    report = run(teacher, low_pass=0.5)
    torch.testing.assert_close(report.images, augment.low_pass(plain.images, 0.5))
    steps = [
        {name: q.step for name, q in quantizer.quantizers(r.calibrated)}  # type: ignore[arg-type]
        for r in (report, plain)
    ]
    assert steps[0]["quantize_x"] < steps[1]["quantize_x"]


def test_labels_are_learned_where_the_teacher_sees_them(teacher: nn.Module, task: Task) -> None:
    settings = express.Settings(images=20, synthesis_steps=5, selective_labels=0.5, student_label_weight=0.25)
    images = express.synthesize(task, settings)
    rows = express.learned_labels(task, images, settings)
    assert rows is not None
    labels = synthesis.balanced_labels(20, 10)
    seen = predict(teacher, images).softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1) > 0.5
    assert 0 < int(seen.sum()) < 20
    assert torch.equal(rows, 0.25 * nn.functional.one_hot(labels, 10) * seen.unsqueeze(1))
    assert express.learned_labels(task, images, express.Settings(images=20)) is None
