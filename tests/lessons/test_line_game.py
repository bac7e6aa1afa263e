"""AKD's game on a line: its terms are those of the losses, and what the lesson says of it holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dfqlib import losses
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.lessons.line_game import GRID, SHARE, curve, divergence, play, prior, standard_error


def two_logits(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.zeros_like(x), x], 1)


def test_divergence_is_the_distillation_loss_of_two_classes() -> None:
    student, teacher = torch.randn(2, 50)
    expected = losses.distillation_loss(two_logits(student), two_logits(teacher))
    assert torch.allclose(divergence(student, teacher).mean(), expected, rtol=1e-4)
    assert divergence(teacher, teacher).abs().max() < 1e-6


def test_prior_is_akds_with_statistics_of_a_standard_normal() -> None:
    x = 2 * torch.randn(100) + 1
    layer = nn.BatchNorm1d(1, eps=1e-12).eval()
    with torch.no_grad(), BatchNormProbe(layer) as probe:
        layer(x[:, None])
        assert torch.allclose(prior(x), losses.akd_prior_loss(two_logits(curve(x)), probe), rtol=1e-4)


def test_more_generators_reach_more_of_the_line_until_the_prior_presses_them_together() -> None:
    one, four = (play(count, alpha=0.0).real_gap[-1] for count in (1, 4))
    assert four.mean() < one.mean() - 3 * math.hypot(standard_error(one), standard_error(four))
    one, four = (play(count, alpha=0.5) for count in (1, 4))
    assert four.real_gap[-1].mean() > one.real_gap[-1].mean() / 2
    assert four.places[-1].std(1).mean() < play(4, alpha=0.0).places[-1].std(1).mean() / 2


def test_students_learn_and_a_seed_repeats_the_games() -> None:
    record = play(2, 3, games=4, rounds=30)
    assert record.places.shape == (30, 4, 2)
    assert record.gaps.shape == (30, 4, len(GRID))
    assert record.real_gap[-1].mean() < record.real_gap[0].mean() / 2
    assert torch.equal(record.gaps, play(2, 3, games=4, rounds=30).gaps)
    assert not torch.equal(record.gaps, play(2, 3, games=4, rounds=30, seed=1).gaps)


def test_real_data_is_standard_normal() -> None:
    assert torch.isclose(SHARE.sum(), torch.tensor(1.0))
    assert abs((SHARE * GRID).sum()) < 1e-5
    assert abs((SHARE * GRID**2).sum() - 1) < 0.01


@pytest.mark.parametrize(
    ("players", "field"), [((0, 1), "generators=0"), ((1, 0), "students=0"), ((1, 1, -1), "alpha=-1")]
)
def test_a_game_without_players_is_refused(players: tuple[int, ...], field: str) -> None:
    with pytest.raises(InputError, match=field):
        play(*players)
