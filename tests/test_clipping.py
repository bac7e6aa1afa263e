"""Clip thresholds: optimal where they claim to be, positive always, clear about what they cannot do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfqlib import clipping
from dfqlib.clipping import METHODS, quantization_error, threshold
from dfqlib.errors import InputError, NonFiniteError


def test_max_clips_nothing() -> None:
    x = torch.tensor([-3.0, 1.0, 2.5])
    assert threshold(x, 4, "max") == 3.0
    assert threshold(x.relu(), 4, "max", signed=False) == 2.5


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 10])
@pytest.mark.parametrize("size", [300, 60_000])
@pytest.mark.parametrize("signed", [True, False])
def test_mse_is_as_good_as_trying_everything(bits: int, size: int, signed: bool) -> None:
    x = torch.randn(size) * torch.rand(size).square()  # heavier tails than a normal
    x = x if signed else x.relu()
    everything = torch.linspace(0.02, 1, 300) * x.abs().max()
    best = quantization_error(x, everything, bits, signed).min()
    assert quantization_error(x, threshold(x, bits, "mse", signed), bits, signed) <= 1.02 * best


def test_mse_finds_a_range_far_inside_an_outlier() -> None:
    x = torch.cat([torch.randn(50_000), torch.tensor([60.0])])
    assert 2 < threshold(x, 4, "mse") < 4
    assert threshold(x, 4, "max") == 60.0


def test_zeros_of_a_relu_cost_nothing() -> None:
    x = torch.randn(50_000).relu()
    padded = torch.cat([x, torch.zeros(50_000)])
    assert threshold(padded, 4, "mse", signed=False) == pytest.approx(threshold(x, 4, "mse", signed=False), rel=0.03)


def test_fewer_bits_clip_more() -> None:
    x = torch.randn(20_000)
    for method in ("mse", "aciq"):
        clips = [threshold(x, bits, method) for bits in (2, 3, 4, 6, 8)]
        assert clips == sorted(clips)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_aciq_constants_minimize_the_expected_error(bits: int) -> None:
    """Against numerical integration of the squared error over both densities."""
    x = torch.linspace(-40, 40, 160_001, dtype=torch.float64)
    densities = {
        clipping._laplace_clip: torch.exp(-x.abs()) / 2,
        clipping._gaussian_clip: torch.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    }
    for optimum, density in densities.items():

        def error(a: float, density: Tensor = density) -> float:
            clipped = (x.abs() - a).clamp_min(0).square()
            return float((clipped * density).sum() * (x[1] - x[0])) + a * a / (3 * 4**bits)

        a = optimum(bits)
        assert error(a) <= min(error(a - 0.01), error(a + 0.01))


def test_aciq_takes_the_prior_that_fits() -> None:
    bits, count = 4, 100_000
    normal = torch.randn(count)
    laplace = torch.distributions.Laplace(0, 1).sample((count,))
    assert threshold(normal, bits, "aciq") == pytest.approx(clipping._gaussian_clip(bits), rel=0.1)
    assert threshold(laplace, bits, "aciq") == pytest.approx(clipping._laplace_clip(bits), rel=0.02)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_kl_takes_float32_whose_bin_edges_are_not_symmetric(bits: int) -> None:
    """Scaled or turned around, values that lie alike on both sides of zero keep their threshold."""
    half = torch.randn(2_500)
    x = torch.cat([half, -half])
    expected = threshold(x, bits, "kl")
    assert 0 < expected <= float(x.abs().max())
    for scale in (-1, 1e-3, 0.1, -1 / 3, 7.7):
        assert threshold(scale * x, bits, "kl") == pytest.approx(abs(scale) * expected, rel=1e-6)


def test_kl_keeps_everything_where_levels_outnumber_bins() -> None:
    x = torch.randn(1_000)
    assert threshold(x, 12, "kl") == float(x.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_scale_with_the_data(method: str) -> None:
    x = torch.randn(4_000)
    for signed, values in ((True, x), (False, x.relu())):
        clip = threshold(values, 4, method, signed)
        assert threshold(values * 8, 4, method, signed) == pytest.approx(8 * clip, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    bits=st.integers(2, 16),
    method=st.sampled_from(METHODS),
)
def test_any_finite_tensor_has_a_positive_threshold(values: list[float], bits: int, method: str) -> None:
    x = torch.tensor(values)
    assert 0 < threshold(x, bits, method) < math.inf
    assert 0 < threshold(x.abs(), bits, method, signed=False) < math.inf


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_activation_gets_a_tiny_threshold(method: str) -> None:
    assert threshold(torch.zeros(2, 3, 4), 4, method, signed=False) == clipping.SMALLEST > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_is_its_own_threshold(method: str) -> None:
    assert threshold(torch.full((50,), -0.75), 8, method) == pytest.approx(0.75)


def test_shape_layout_and_gradient_do_not_matter() -> None:
    x = torch.randn(4, 8, 5, 5)
    expected = threshold(x.flatten(), 4)
    assert threshold(x, 4) == expected
    assert threshold(x.clone().requires_grad_(), 4) == expected
    assert threshold(x.to(torch.float64), 4) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_named(value: float) -> None:
    with pytest.raises(NonFiniteError, match="NaN or an infinity"):
        threshold(torch.tensor([0.0, value, 1.0]), 4)


def test_an_empty_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        threshold(torch.zeros(0, 3), 4)


@pytest.mark.parametrize("bits", [1, 17, 0, -4, 4.0, True, "4"])
def test_bits_out_of_range_are_refused(bits: object) -> None:
    with pytest.raises(InputError, match="from 2 to 16"):
        threshold(torch.ones(3), bits)  # type: ignore[arg-type]


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="max, mse, aciq, kl"):
        threshold(torch.ones(3), 4, "percentile")


def test_half_range_refuses_negative_values() -> None:
    with pytest.raises(InputError, match="signed=True"):
        threshold(torch.tensor([1.0, -0.5]), 4, signed=False)
