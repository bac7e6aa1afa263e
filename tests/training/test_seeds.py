"""Seeds: two runs with different seeds have no random number in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from short_runs import SHORT, short
from torch import nn

import dfqlib
from dfqlib.training import Session

RECIPES = [*SHORT, "express", "calibrate", "equalize"]
TINY = {
    "express": {"images": 12, "synthesis_batch": 4, "synthesis_steps": 2, "steps": 2, "batch": 4, "superposed": 0.5},
    "calibrate": {"images": 8, "synthesis_steps": 2},
    "equalize": {"images": 8, "synthesis_steps": 2},
}


@pytest.fixture
def seeds_of(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], list[int]]:
    """Every seed that PyTorch is given in a run of a recipe."""
    original, given = torch.manual_seed, list[int]()

    def seeds(recipe: str, seed: int) -> list[int]:
        given.clear()
        monkeypatch.setattr(torch, "manual_seed", lambda value: (given.append(value), original(value))[1])
        if recipe in SHORT:
            short(teacher, recipe, seed=seed)
        else:
            dfqlib.quantize(teacher, (1, 16, 16), recipe=recipe, seed=seed, progress=False, **TINY[recipe])
        return [value for value in given if value != 0]  # 0: the images that only check whether the model runs

    return seeds


@pytest.mark.parametrize("recipe", RECIPES)
def test_runs_of_different_seeds_share_no_stream(recipe: str, seeds_of: Callable[[str, int], list[int]]) -> None:
    one, two = seeds_of(recipe, 0), seeds_of(recipe, 1)
    assert len(one) == len(two) > 0
    assert not set(one) & set(two)


def test_no_two_purposes_and_seeds_share_a_stream() -> None:
    purposes = [f"{kind} {index}" for kind in ("noise", "synthesis", "fine-tuning") for index in range(10)]
    streams = [Session(seed).reseed(purpose) for seed in range(20) for purpose in purposes]
    assert len(set(streams)) == len(streams)
    assert all(0 <= stream < 2**63 for stream in streams)


def test_images_of_different_seeds_begin_with_different_noise(teacher: nn.Module) -> None:
    options = {**TINY["express"], "synthesis_steps": 1, "steps": 0, "superposed": 0.0}
    made = [
        dfqlib.quantize(teacher, (1, 16, 16), seed=seed, progress=False, **options).images.flatten(1)
        for seed in range(3)
    ]
    images = torch.cat(made)
    alike = torch.corrcoef(images) - torch.eye(len(images))
    assert float(alike.abs().max()) < 0.5  # two that began alike would correlate by more than 0.9
