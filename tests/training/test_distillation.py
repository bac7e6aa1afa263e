"""The learning rates of fine-tuning."""

from typing import Any

import pytest
import torch
from short_runs import SHAPE, SHORT
from torch import nn

import dfqlib
from dfqlib.quantizer import QuantSpec
from dfqlib.training import distillation

TUNED: dict[str, dict[str, Any]] = {
    "express": {"images": 4, "synthesis_steps": 1, "steps": 1, "batch": 2},
    "real": {"images": torch.zeros(2, *SHAPE), "steps": 1, "batch": 2},
    "dsg": {**SHORT["dsg"], "then": "fine-tune"},
    "deepinversion": {**SHORT["deepinversion"], "rounds": 1},
}


@pytest.mark.parametrize(
    ("weights", "activations", "times"),
    [(4, 4, 1), (3, 3, 2), (2, 2, 4), (3, 4, 2), (4, 2, 4), (8, 8, 1), (16, 3, 2)],
)
def test_the_peak_learning_rate_doubles_with_each_bit_below_four(weights: int, activations: int, times: int) -> None:
    assert distillation.peak_lr(2e-4, QuantSpec(weights, activations)) == pytest.approx(times * 2e-4)


@pytest.mark.parametrize("recipe", TUNED)
def test_recipes_fine_tune_at_that_peak(teacher: nn.Module, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[list[float]] = []
    one_cycle = torch.optim.lr_scheduler.OneCycleLR

    def noted(optimizer: torch.optim.Optimizer, max_lr: list[float], **options: Any) -> Any:
        peaks.append(max_lr)
        return one_cycle(optimizer, max_lr, **options)

    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", noted)
    settings = {**TUNED[recipe], "lr": 1e-5, "step_lr": 0.5}
    dfqlib.quantize(teacher, SHAPE, "w2a4", recipe=recipe, progress=False, **settings)
    assert peaks == [pytest.approx([4e-5, 2e-5])]
