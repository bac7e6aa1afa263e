"""Each weight in a recipe's settings multiplies its own term: the first loss is ``loss(0) + weight * term``."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from short_runs import short
from torch import Tensor, nn

import dfqlib

FIRST = {"warm_up_epochs": 1, "epochs": 0, "iterations": 1, "bf16": False}
TUNED = {"warm_up_epochs": 0, "epochs": 1, "iterations": 1, "bf16": False}
PIXELS = {"synthesis_steps": 1, "bf16": False}
NO_LABELS = {"student_label_weight": 0.0}
CASES: list[Any] = [
    # recipe, weight, row of the history, its loss, sign of the term, the term, which of its calls; other settings
    ("gdfq", "label_weight", "warm-up", "generator", 1, "label_loss", 0, {**FIRST, **NO_LABELS}),
    ("gdfq", "bn_weight", "warm-up", "generator", 1, "bn_l2_loss", 0, FIRST),
    ("gdfq", "student_label_weight", "fine-tuning", "loss", 1, "label_loss", 1, TUNED),
    ("gdfq", "kd_weight", "fine-tuning", "loss", 1, "distillation_loss", 0, TUNED),
    ("dfqf", "alpha", "warm-up", "generator", -1, "batch_entropy", 0, FIRST),
    ("dfqf", "bn_weight", "warm-up", "generator", 1, "bn_divergence_loss", 0, FIRST),
    ("dfqf", "adversarial_weight", "warm-up", "generator", 1, "adversarial_loss", 0, FIRST),
    ("dafl", "one_hot_weight", "warm-up", "generator", 1, "one_hot_loss", 0, FIRST),
    ("dafl", "balance_weight", "warm-up", "generator", -1, "batch_entropy", 0, FIRST),
    ("akd", "alpha", "fine-tuning", "generator", 1, "akd_prior_loss", 0, {**TUNED, "student_steps": 1}),
    ("deepinversion", "r", "synthesis", "loss", 1, "bn_norm_loss", 0, {**PIXELS, "rounds": 1, "steps": 0}),
    ("deepinversion", "tv_weight", "synthesis", "loss", 1, "total_variation_loss", 0, {**PIXELS, "rounds": 1}),
    ("deepinversion", "competition_weight", "synthesis 2/2", "loss", 1, "competition_loss", 0, PIXELS),
]


@pytest.fixture
def calls_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[float]]:
    """What a term of the losses was at each of its calls."""

    def watch(term: str) -> list[float]:
        found: list[float] = []
        for name, module in list(sys.modules.items()):
            if name.startswith("dfqlib.losses") and hasattr(module, term):
                monkeypatch.setattr(module, term, watched(getattr(module, term), found))
        return found

    def watched(original: Callable[..., Tensor], found: list[float]) -> Callable[..., Tensor]:
        def term(*arguments: Any, **options: Any) -> Tensor:
            value = original(*arguments, **options)
            found.append(float(value.detach()))
            return value

        return term

    return watch


@pytest.mark.parametrize(("recipe", "weight", "phase", "loss", "sign", "term", "call", "settings"), CASES)
def test_the_loss_is_that_without_the_term_and_the_weighted_term(
    teacher: nn.Module, calls_of: Callable[[str], list[float]], recipe: str, weight: str, phase: str, loss: str,
    sign: int, term: str, call: int, settings: dict[str, Any],
) -> None:  # fmt: skip
    values = calls_of(term)

    def first_loss(size: float) -> float:
        values.clear()
        history = short(teacher, recipe, **{**settings, weight: size}).history
        return next(row[loss] for row in history if row["phase"] == phase)

    without, found = first_loss(0.0), first_loss(3.0)
    assert abs(values[call]) > 1e-6
    assert found == pytest.approx(without + 3 * sign * values[call], rel=1e-4)


def test_dafl_rewards_the_features_by_their_weight(teacher: nn.Module) -> None:
    losses = [short(teacher, "dafl", activation_weight=size, **FIRST).history[0]["generator"] for size in (0, 1, 3)]
    assert losses[1] < losses[0]
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)


@pytest.mark.parametrize("weight", ["label_weight", "hard_samples"])
def test_express_adds_the_weighted_label_loss_to_the_statistics(teacher: nn.Module, weight: str) -> None:
    changes = {"images": 8, "synthesis_steps": 1, "steps": 0, "bf16": False, "progress": False}
    for size in (0.25, 3.0):
        row = dfqlib.quantize(teacher, (1, 16, 16), **changes, **{weight: size}).history[0]
        assert row["loss"] == pytest.approx(row["bn"] + size * row["label"], rel=1e-5)
        assert row["label"] > 1e-3


@pytest.mark.parametrize("enhancement", [True, False])
def test_dsg_enhances_layers_or_matches_the_whole_batch(
    teacher: nn.Module, calls_of: Callable[[str], list[float]], enhancement: bool
) -> None:
    enhanced, plain = calls_of("layerwise_enhancement"), calls_of("slack_bn_loss")
    history = short(teacher, "dsg", enhancement=enhancement, iterations=1, bf16=False).history
    taken, left = (enhanced, plain) if enhancement else (plain, enhanced)
    assert history[0]["loss"] == pytest.approx(taken[0], rel=1e-6)
    assert left == []


def test_dfad_takes_from_the_generator_what_the_student_pays(
    teacher: nn.Module, calls_of: Callable[[str], list[float]]
) -> None:
    distances = calls_of("dfad_loss")
    history = short(teacher, "dfad", **FIRST).history
    assert history[0]["generator"] == pytest.approx(-distances[0], rel=1e-6)
