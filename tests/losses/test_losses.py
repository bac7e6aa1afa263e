"""Each term against a case worked by hand, and what minimizes it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dfqlib import losses
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.losses import SlackMargin

CERTAIN = 40.0
"""A logit so far above the others that its class has all the probability."""


def _certain(*classes: int, of: int = 4) -> Tensor:
    return CERTAIN * nn.functional.one_hot(torch.tensor(classes), of).float()


@pytest.fixture
def probe() -> Iterator[BatchNormProbe]:
    """Two layers in a row, their stored mean and variance (0, 1) and (1, 4)."""
    model = nn.Sequential(nn.BatchNorm2d(1, eps=1e-5, affine=False), nn.BatchNorm2d(1, eps=1e-5, affine=False)).eval()
    model[1].running_mean.fill_(1.0)
    model[1].running_var.fill_(4.0)
    with BatchNormProbe(model) as probe:
        model(_plus_minus(mean=2.0, std=3.0))
        yield probe


def _plus_minus(mean: float, std: float) -> Tensor:
    """Two images of two pixels: each channel's mean and biased deviation are exactly those given."""
    return torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(2, 1, 1, 2) * std + mean


# The first layer passes (x - 0) / sqrt(1 + eps), so both see mean 2 and variance 9 (to 1e-5).
GAPS = {"first": (2.0 - 0, 9.0 - 1), "second": (2.0 - 1, 9.0 - 4)}


def test_bn_norms(probe: BatchNormProbe) -> None:
    expected = sum(abs(mean) + abs(var) for mean, var in GAPS.values())
    assert losses.bn_norm_loss(probe, "sum").item() == pytest.approx(expected, rel=1e-3)
    assert losses.bn_norm_loss(probe).item() == pytest.approx(expected / 2, rel=1e-3)


def test_bn_l2_is_the_sum_or_the_mean_of_squares(probe: BatchNormProbe) -> None:
    expected = sum(mean**2 + var**2 for mean, var in GAPS.values())
    assert losses.bn_l2_loss(probe).item() == pytest.approx(expected, rel=1e-3)
    assert losses.bn_l2_loss(probe, "released").item() == pytest.approx(expected / 2, rel=1e-3)


def test_bn_divergence_uses_the_unbiased_variance(probe: BatchNormProbe) -> None:
    var = 9 * 4 / 3
    expected = (var - math.log(var) + 4) + (var - 4 * math.log(var) + 1)
    assert losses.bn_divergence_loss(probe).item() == pytest.approx(expected, rel=1e-3)


def test_bn_gaussian_kl_is_that_of_torch(probe: BatchNormProbe) -> None:
    seen = torch.distributions.Normal(2.0, 3.0)
    stored = (torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.0, 2.0))
    expected = sum(float(torch.distributions.kl_divergence(seen, normal)) for normal in stored)
    assert losses.bn_gaussian_kl_loss(probe).item() == pytest.approx(expected, rel=1e-3)


def test_zeroq_takes_each_image_alone(probe: BatchNormProbe) -> None:
    std = 3 * math.sqrt(2)  # unbiased, of two pixels
    layers = (2 - 0) ** 2 + (std - 1) ** 2 + (2 - 1) ** 2 + (std - 2) ** 2
    loss = losses.zeroq_loss(probe, _plus_minus(0.0, 1 / math.sqrt(2)))  # the images themselves are as they should be
    assert loss.item() == pytest.approx(layers, rel=1e-3)
    off = losses.zeroq_loss(probe, _plus_minus(0.5, math.sqrt(2)))  # of mean 1/2 and deviation 2 instead of 0 and 1
    assert off.item() == pytest.approx(layers + 0.5**2 + 1, rel=1e-3)


def _layer(mean: float = 0.0, var: float = 1.0, channels: int = 2) -> nn.Module:
    layer = nn.BatchNorm2d(channels).eval()
    nn.init.constant_(layer.running_mean, mean)
    nn.init.constant_(layer.running_var, var)
    return layer


@pytest.mark.parametrize(
    "loss", [losses.bn_norm_loss, losses.bn_l2_loss, losses.bn_gaussian_kl_loss, losses.bn_divergence_loss]
)
def test_descent_brings_the_statistics_to_those_stored(loss) -> None:  # type: ignore[no-untyped-def]
    images = torch.randn(8, 2, 6, 6, requires_grad=True)
    optimizer = torch.optim.Adam([images], lr=0.05)
    with BatchNormProbe(_layer(0.7, 2.25)) as probe:
        for _ in range(300):
            optimizer.zero_grad()
            probe._model(images)
            loss(probe).backward()
            optimizer.step()
        probe._model(images)
        mean, var = next(iter(probe)).statistics()
    torch.testing.assert_close(mean, torch.full((2,), 0.7), atol=0.05, rtol=0)
    torch.testing.assert_close(var, torch.full((2,), 2.25), atol=0.15, rtol=0)


def test_a_dead_channel_costs_a_finite_amount() -> None:
    model, images = _layer(), torch.zeros(4, 2, 3, 3, requires_grad=True)
    with BatchNormProbe(model) as probe:
        model(images)
        total = (
            losses.bn_divergence_loss(probe)
            + losses.bn_gaussian_kl_loss(probe)
            + losses.zeroq_loss(probe, images)
            + losses.slack_bn_loss(probe, [SlackMargin(0, 0)])
        )
        total.backward()
    assert total.isfinite()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_inception_score_is_best_when_certain_and_balanced() -> None:
    balanced = losses.inception_score_loss(_certain(0, 1, 2, 3), alpha=40).item()
    assert balanced == pytest.approx(-40 * math.log(4), rel=1e-5)
    collapsed = losses.inception_score_loss(_certain(1, 1, 1, 1), alpha=40).item()
    assert collapsed == pytest.approx(0, abs=1e-5)
    unsure = losses.inception_score_loss(torch.zeros(4, 4), alpha=40).item()
    assert unsure == pytest.approx(-39 * math.log(4), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-60, 60, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_entropies_lie_between_certainty_and_balance(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows, requires_grad=True)
    sample, batch = losses.sample_entropy(logits), losses.batch_entropy(logits)
    # The mean entropy is never above the entropy of the mean: their gap is what an image tells of its class.
    assert -1e-5 <= sample.item() <= batch.item() + 1e-4 <= math.log(3) + 1e-3
    (gradient,) = torch.autograd.grad(sample - batch, logits)
    assert gradient.isfinite().all()


def test_distillation_by_hand() -> None:
    teacher, student = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)  # (1/4, 3/4) against (1/2, 1/2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert losses.distillation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    released = losses.distillation_loss(student, teacher, variant="released")
    assert released.item() == pytest.approx(expected / 2, rel=1e-5)
    assert losses.adversarial_loss(student, teacher).item() == pytest.approx(-expected, rel=1e-5)
    softened = losses.distillation_loss(20 * student, 20 * teacher, 20.0)  # the same probabilities; GDFQ, Eq. 8
    assert softened.item() == pytest.approx(20**2 * expected, rel=1e-4)


def test_a_high_temperature_compares_logits() -> None:
    """Hinton et al. 2015: for T to infinity the loss tends to half the variance of the logits' difference."""
    teacher, student = torch.randn(2, 6, 5, dtype=torch.float64)
    half_variance = (teacher - student).var(1, correction=0).mean() / 2
    loss = losses.distillation_loss(student, teacher, temperature=1e3)
    assert loss.item() == pytest.approx(half_variance.item(), rel=0.01)


def test_distillation_is_zero_only_for_the_teachers_outputs() -> None:
    teacher = torch.randn(6, 5)
    assert losses.distillation_loss(teacher + 3, teacher, 4.0).item() == pytest.approx(0, abs=1e-5)
    assert losses.distillation_loss(torch.randn(6, 5), teacher, 4.0).item() > 0.01


def test_label_loss_takes_labels_and_mixtures() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    by_hand = -logits.log_softmax(1)[range(4), labels].mean()
    torch.testing.assert_close(losses.label_loss(logits, labels), by_hand)
    one_hot = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(losses.label_loss(logits, one_hot), by_hand)


def test_one_hot_by_hand() -> None:
    """Probabilities 1/4 and 3/4: the class that the network chooses itself costs -log 3/4, whichever it is."""
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    assert losses.one_hot_loss(logits).item() == pytest.approx(-math.log(0.75))
    assert losses.one_hot_loss(_certain(1, 2)).item() == pytest.approx(0)


def test_akd_prior_by_hand(probe: BatchNormProbe) -> None:
    """Gaussians of mean 2 and variance 9 against (0, 1) and (1, 4); two certain images of two classes."""
    first = (9 + 2**2) / 2 - math.log(9) / 2 - 0.5
    second = (9 + 1**2) / (2 * 4) - math.log(9 / 4) / 2 - 0.5
    assert losses.akd_prior_loss(_certain(0, 1), probe).item() == pytest.approx(first + second - math.log(2), rel=1e-3)
    even = losses.akd_prior_loss(torch.zeros(2, 4), probe)  # each image undecided, the batch balanced: they cancel
    assert even.item() == pytest.approx(first + second, rel=1e-3)


def test_dafl_by_hand() -> None:
    features = torch.tensor([[1.0, -3.0]])
    paper = losses.dafl_loss(_certain(0, 1, 2, 3), features)
    assert paper.item() == pytest.approx(-5 * math.log(4) - 0.01 * 2, rel=1e-5)
    released = losses.dafl_loss(_certain(0, 1, 2, 3), features, variant="released")
    assert released.item() == pytest.approx(-5 * math.log10(4) - 0.01 * 2, rel=1e-5)
    unsure = losses.dafl_loss(torch.zeros(4, 4), features, balance_weight=0, activation_weight=0)
    assert unsure.item() == pytest.approx(0.05 * math.log(4), rel=1e-5)


def test_dfad_is_the_mean_absolute_difference() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]])
    assert losses.dfad_loss(student, teacher).item() == 2.0


def test_competition_lies_between_agreement_and_contradiction() -> None:
    logits = torch.randn(4, 4)
    assert losses.competition_loss(logits, logits).item() == pytest.approx(1, abs=1e-6)
    opposite = losses.competition_loss(_certain(0, 1), _certain(2, 3), temperature=1)
    assert opposite.item() == pytest.approx(1 - math.log(2), rel=1e-5)


def test_competition_by_hand() -> None:
    """At the paper's temperature of 3 the outputs are (1/2, 1/2) and (1/4, 3/4); their mean is (3/8, 5/8)."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 3 * math.log(3)]])
    halves = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    quarters = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    assert losses.competition_loss(student, teacher).item() == pytest.approx(1 - (halves + quarters) / 2, rel=1e-5)


def test_total_variation_by_hand() -> None:
    assert losses.total_variation_loss(torch.full((2, 3, 4, 4), 5.0)).item() == 0
    step = torch.tensor([[0.0, 3.0], [0.0, 3.0]]).view(1, 1, 2, 2)
    # Right: two differences of 3; down: none; each diagonal: one of 3.
    assert losses.total_variation_loss(step).item() == pytest.approx(3 * math.sqrt(2) + 3 + 3)


def test_objectives_are_the_weighted_sums_of_the_papers(probe: BatchNormProbe) -> None:
    teacher, student, labels = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([0, 3])
    kd, label = losses.distillation_loss(student, teacher), losses.label_loss(teacher, labels)
    images = torch.randn(2, 1, 4, 4)
    pairs = [
        (
            losses.dfqf_generator_loss(teacher, student, probe),
            losses.inception_score_loss(teacher, 40) + 0.1 * losses.bn_divergence_loss(probe) - 5 * kd,
        ),
        (
            losses.gdfq_generator_loss(teacher, labels, probe, variant="released"),
            label + 0.1 * losses.bn_l2_loss(probe, "released"),
        ),
        (
            losses.gdfq_student_loss(student, teacher, labels),
            losses.label_loss(student, labels) + losses.distillation_loss(student, teacher, 20),
        ),
        (
            losses.akd_generator_loss(teacher, [student, teacher], probe),
            0.01 * (losses.bn_gaussian_kl_loss(probe) + losses.sample_entropy(teacher) - losses.batch_entropy(teacher))
            - kd / 2,
        ),
        (
            losses.deep_inversion_loss(teacher, labels, probe, images, bn_weight=10, tv_weight=0.5),
            label + 10 * losses.bn_norm_loss(probe, "sum") + 0.5 * losses.total_variation_loss(images),
        ),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)


def test_only_what_exceeds_the_slack_costs(probe: BatchNormProbe) -> None:
    """Gaps of the mean 2 and 1, of the deviation 2 and 1."""
    loss = losses.slack_bn_loss(probe, [SlackMargin(0.5, 1.0), SlackMargin(0.25, 0.75)])
    assert loss.item() == pytest.approx(1.5**2 + 1**2 + 0.75**2 + 0.25**2, rel=1e-3)


def test_a_gap_within_the_slack_has_no_gradient() -> None:
    """The released code's max(|gap - delta|, 0) would cost delta - gap here."""
    model, images = _layer(), torch.randn(8, 2, 6, 6, requires_grad=True)
    with BatchNormProbe(model) as probe:
        model(images)
        loss = losses.slack_bn_loss(probe, [SlackMargin(10, 10)])
        loss.backward()
    assert loss.item() == 0
    assert images.grad is not None
    assert not images.grad.any()


def test_margins_are_the_percentile_of_the_gaps_of_gaussian_images() -> None:
    model = _layer(channels=5)
    nn.init.constant_(model.running_var, 4.0)
    with torch.no_grad():
        model.running_mean.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    for batch_size in (64, 50):  # the last batch may be smaller
        rng = torch.Generator().manual_seed(0)
        (margin,) = losses.slack_margins(model, (5, 16, 16), 0.75, images=256, batch_size=batch_size, rng=rng)
        assert margin.mean == pytest.approx(3.0, abs=0.03)
        assert margin.std == pytest.approx(1.0, abs=0.02)


def test_margins_of_no_slack_and_of_all() -> None:
    model = _layer(channels=5)
    ranges = [losses.slack_margins(model, (5, 8, 8), percentile, images=64)[0] for percentile in (0, 0.5, 1)]
    assert [margin.mean for margin in ranges] == sorted(margin.mean for margin in ranges)


def test_enhancement_counts_layer_n_twice_for_image_n() -> None:
    model = nn.Sequential(_layer(), _layer(0.5), _layer(0, 2)).eval()
    margins = [SlackMargin(0.1, 0.2)] * 3
    images = torch.randn(3, 2, 4, 4)
    with BatchNormProbe(model) as probe:
        model(images)
        found = losses.layerwise_enhancement(probe, margins)
        each = torch.zeros(3, 3)  # image, layer
        for layer_index in range(3):
            for image_index in range(3):
                model(images[image_index : image_index + 1])
                alone = [SlackMargin(math.inf, math.inf)] * 3
                alone[layer_index] = margins[layer_index]
                each[image_index, layer_index] = losses.slack_bn_loss(probe, alone)
    weights = 1 + torch.eye(3)
    torch.testing.assert_close(found, (weights * each).sum() / 3, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.floats(0, 2), min_size=8, max_size=8))
def test_a_wider_margin_never_costs_more(seed: int, sizes: list[float]) -> None:
    model = nn.Sequential(_layer(0.5, 2.0), _layer(-0.5, 0.5)).eval()
    narrow = [SlackMargin(*sizes[:2]), SlackMargin(*sizes[2:4])]
    wide = [SlackMargin(a + c, b + d) for (a, b), (c, d) in zip(narrow, (sizes[4:6], sizes[6:]), strict=True)]
    with BatchNormProbe(model) as probe:
        model(torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(seed)))
        for loss in (losses.slack_bn_loss, losses.layerwise_enhancement):
            assert 0 <= loss(probe, wide) <= loss(probe, narrow)


def test_enhancement_needs_one_image_per_layer(probe: BatchNormProbe) -> None:
    assert losses.layerwise_enhancement(probe, [SlackMargin(0, 0)] * 2) > 0
    probe._model(torch.randn(3, 1, 2, 2))
    with pytest.raises(InputError, match="3 images"):
        losses.layerwise_enhancement(probe, [SlackMargin(0, 0)] * 2)


def test_bad_arguments_are_named(probe: BatchNormProbe) -> None:
    two, three = torch.zeros(4, 2), torch.zeros(4, 3)
    for function in (
        losses.distillation_loss,
        losses.dfad_loss,
        losses.competition_loss,
        losses.adversarial_loss,
    ):
        with pytest.raises(InputError, match="student has shape"):
            function(two, three)
    for function in (losses.distillation_loss, losses.competition_loss):
        with pytest.raises(InputError, match="temperature=0"):
            function(two, two, 0)
    with pytest.raises(InputError, match="variant='code'"):
        losses.distillation_loss(two, two, variant="code")
    with pytest.raises(InputError, match="variant='code'"):
        losses.bn_l2_loss(probe, "code")
    with pytest.raises(InputError, match="reduction='max'"):
        losses.bn_norm_loss(probe, "max")
    with pytest.raises(InputError, match="margins has 1"):
        losses.slack_bn_loss(probe, [SlackMargin(0, 0)])
    with pytest.raises(InputError, match="percentile=90"):
        losses.slack_margins(_layer(), (2, 4, 4), 90)
    with pytest.raises(InputError, match="images=0"):
        losses.slack_margins(_layer(), (2, 4, 4), images=0)
    with pytest.raises(InputError, match="students is empty"):
        losses.akd_generator_loss(two, [], probe)
