"""Measures of diversity against cases worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfqlib import data, losses
from dfqlib.errors import InputError
from dfqlib.evaluation.diversity import inception_score, pairwise_distance, statistics_spread


def _certain(*classes: int, of: int = 4) -> Tensor:
    return 60.0 * nn.functional.one_hot(torch.tensor(classes), of).float()


def test_inception_score_counts_the_classes_of_sure_and_balanced_images() -> None:
    assert inception_score(_certain(0, 1, 2, 3)) == pytest.approx(4)
    assert inception_score(_certain(0, 0, 2, 2)) == pytest.approx(2)
    assert inception_score(_certain(3, 3)) == pytest.approx(1)
    assert inception_score(torch.zeros(8, 4)) == pytest.approx(1)


def test_inception_score_by_hand() -> None:
    probabilities = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    divergence = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()  # of either from (1/2, 1/2)
    assert inception_score(probabilities.log()) == pytest.approx(float(divergence.exp()))


def test_inception_score_is_what_the_inception_score_loss_lowers() -> None:
    logits = torch.randn(32, 5)
    assert inception_score(logits) == pytest.approx(float((-losses.inception_score_loss(logits, alpha=1.0)).exp()))


def test_pairwise_distance_by_hand() -> None:
    """Three images of four pixels at 0, 1 and 3: distances 1, 2 and 3."""
    images = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert pairwise_distance(images) == pytest.approx(2)
    assert pairwise_distance(images[:1].repeat(5, 1, 1, 1)) == 0


@pytest.mark.parametrize("pixels", [100, 10_000])
def test_pairwise_distance_of_noise_does_not_grow_with_the_image(pixels: int) -> None:
    assert pairwise_distance(torch.randn(20, pixels)) == pytest.approx(2**0.5, rel=0.02)


def test_spread_by_hand() -> None:
    """Two images of two pixels: means 1 and 5, deviations 1 and 3; the layer has stored the variance 4."""
    layer = nn.BatchNorm2d(1, eps=0.0)
    layer.running_var.fill_(4.0)
    images = torch.tensor([[0.0, 2.0], [2.0, 8.0]]).view(2, 1, 1, 2)
    (spread,) = statistics_spread(nn.Sequential(layer).eval(), images)
    assert spread.name == "0"
    assert spread.means.flatten().tolist() == [1, 5]
    assert spread.stds.flatten().tolist() == [1, 3]
    assert spread.mean_spread == pytest.approx(2 / 2)
    assert spread.std_spread == pytest.approx(1 / 2)


def test_equal_images_have_no_spread_and_shuffling_them_changes_nothing(teacher: nn.Module) -> None:
    images = data.images_and_labels(data.load_data("digits"), 40)[0]
    assert all(
        s.mean_spread < 1e-6 and s.std_spread < 1e-6 for s in statistics_spread(teacher, images[:1].repeat(9, 1, 1, 1))
    )
    whole, split = statistics_spread(teacher, images), statistics_spread(teacher, images.flip(0), batch=16)
    for one, other in zip(whole, split, strict=True):
        assert one.name == other.name
        assert one.mean_spread == pytest.approx(other.mean_spread, rel=1e-4)
        assert one.std_spread == pytest.approx(other.std_spread, rel=1e-4)


def test_a_layer_without_extent_has_no_deviations() -> None:
    (spread,) = statistics_spread(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)).eval(), torch.randn(6, 1, 2, 2))
    assert spread.std_spread == 0 < spread.mean_spread


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inception_score(torch.zeros(3)), r"logits has shape \(3,\)"),
        (lambda: pairwise_distance(torch.zeros(1, 4)), r"samples has shape \(1, 4\)"),
        (lambda: statistics_spread(nn.BatchNorm2d(1).eval(), torch.zeros(1, 1, 2, 2)), "two or more"),
        (lambda: statistics_spread(nn.BatchNorm2d(1), torch.zeros(2, 1, 2, 2)), r"call model.eval\(\)"),
        (lambda: statistics_spread(nn.Identity().eval(), torch.zeros(2, 1, 2, 2)), "no BatchNorm layer"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
