"""What holds of every tensor, width and network that a quantizer meets."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import clipping
from dfqlib.quantizer import (
    AffineQuantizer,
    QuantSpec,
    StepQuantizer,
    affine_quantize,
    fake_quantize,
    integer_range,
    quantize_layers,
    quantizers,
)

seeds = st.integers(0, 2**31 - 1)
widths = st.integers(2, 16)
tensors = seeds.map(lambda seed: 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)))
specs = st.builds(
    QuantSpec, widths, widths, widths, granularity=st.sampled_from(["tensor", "channel"]),
    scheme=st.sampled_from(["symmetric", "affine"]), step=st.sampled_from(["learned", "fixed"]),
    skip=st.sampled_from(["quantized", "float"]), layers=st.dictionaries(st.text(), widths, max_size=2),
)  # fmt: skip


# Fake quantization


def assert_same_but_at_ties(ours: Tensor, theirs: Tensor, scaled: Tensor) -> None:
    """PyTorch multiplies by 1 / step, which carries a few values over the middle between two."""
    clear = ((scaled - scaled.floor()) - 0.5).abs() > 1e-3
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(ours[clear], theirs[clear])


@settings(deadline=None, max_examples=50)
@given(tensors, st.integers(2, 8), st.booleans(), st.floats(0.01, 2.0))
def test_a_tensors_step_gives_what_pytorch_gives(x: Tensor, bits: int, signed: bool, step: float) -> None:
    bounds = integer_range(bits, signed)
    theirs = torch.fake_quantize_per_tensor_affine(x, step, 0, *bounds)
    assert_same_but_at_ties(fake_quantize(x, step, *bounds), theirs, x / step)


@settings(deadline=None, max_examples=50)
@given(tensors, st.integers(2, 8), st.lists(st.floats(0.01, 2.0), min_size=4, max_size=4))
def test_a_step_per_channel_gives_what_pytorch_gives(x: Tensor, bits: int, steps: list[float]) -> None:
    bounds, scales = integer_range(bits, signed=True), torch.tensor(steps)
    theirs = torch.fake_quantize_per_channel_affine(x, scales, torch.zeros(4, dtype=torch.int32), 0, *bounds)
    column = scales.unsqueeze(1)
    assert_same_but_at_ties(fake_quantize(x, column, *bounds), theirs, x / column)


@settings(deadline=None, max_examples=50)
@given(tensors, st.integers(2, 8), st.booleans(), st.floats(0.01, 2.0), st.integers(-20, 20))
def test_powers_of_two_pass_through_a_quantizer(x: Tensor, bits: int, signed: bool, step: float, power: int) -> None:
    bounds, factor = integer_range(bits, signed), 2.0**power
    expected = factor * fake_quantize(x, step, *bounds)
    assert torch.equal(fake_quantize(factor * x, factor * step, *bounds), expected)


@settings(deadline=None, max_examples=12)
@given(tensors, st.integers(2, 8), st.sampled_from(clipping.METHODS), st.integers(-8, 8))
def test_powers_of_two_pass_through_calibration(x: Tensor, bits: int, method: str, power: int) -> None:
    found = []
    for factor in (1.0, 2.0**power):
        quantizer = StepQuantizer(bits, signed=True)
        quantizer.method = method
        quantizer.calibrate(factor * x)
        found.append(quantizer.step.item() / factor)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(tensors, st.integers(2, 8))
def test_what_affine_quantization_gives_it_leaves(x: Tensor, bits: int) -> None:
    bounds = x.amin(1), x.amax(1)
    once = affine_quantize(x, *bounds, bits)
    torch.testing.assert_close(affine_quantize(once, *bounds, bits), once)


@settings(deadline=None, max_examples=8)
@given(tensors, st.integers(2, 8), st.sampled_from(clipping.METHODS), st.floats(0, 1))
def test_steps_per_channel_are_those_of_each_channel_alone(
    x: Tensor, bits: int, method: str, lower_bound: float
) -> None:
    together = StepQuantizer(bits, signed=True, channels=len(x))
    together.method, together.lower_bound = method, lower_bound
    together.calibrate(x)
    for row, step in zip(x, together.step, strict=True):
        clip = max(clipping.threshold(row, bits, method), lower_bound * float(row.abs().max()))
        assert step.item() == pytest.approx(clip / together.qmax, rel=1e-6)


def test_bounds_per_channel_are_those_of_each_channel_alone() -> None:
    quantizer, x = AffineQuantizer(4, channels=3), torch.randn(3, 2, 5, 5)
    quantizer.calibrate(x)
    torch.testing.assert_close(quantizer.low.detach(), x.amin((1, 2, 3)))
    torch.testing.assert_close(quantizer.high.detach(), x.amax((1, 2, 3)))
    assert not any(bound.requires_grad for bound in quantizer.parameters())


# What a network is to look like


@settings(max_examples=40)
@given(specs)
def test_a_spec_is_read_from_its_widths_and_fields(spec: QuantSpec) -> None:
    fields = dataclasses.asdict(spec)
    assert QuantSpec.parse(spec) == QuantSpec(**fields) == spec
    widths = f"w{fields.pop('weight_bits')}a{fields.pop('activation_bits')}"
    assert QuantSpec.parse(widths, **fields) == spec
    assert str(spec).lower().startswith(f"{widths} ")


@pytest.mark.parametrize(
    "change",
    [
        {"weight_bits": 3}, {"activation_bits": 3}, {"edge_bits": 4}, {"granularity": "channel"}, {"scheme": "affine"},
        {"step": "fixed"}, {"skip": "float"}, {"layers": {"stem": 8}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_specs_that_differ_are_written_differently(change: dict[str, Any]) -> None:
    assert str(QuantSpec(**change)) != str(QuantSpec())


# Which layers are the first and the last


class Opaque(nn.Module):
    """A block whose control flow depends on values, which no graph can show."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x)) if x.sum() > -1e9 else x
        return x


def tree(draw: random.Random, depth: int) -> nn.Module:
    """Convolutions in nested containers, some of them in blocks that cannot be traced."""
    if depth == 0 or draw.random() < 0.2:
        return nn.Conv2d(2, 2, 1)
    children = [tree(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    return Opaque(*children) if draw.random() < 0.4 else nn.Sequential(*children, nn.ReLU())


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_the_first_and_the_last_layer_that_run_have_their_own_width(draw: random.Random) -> None:
    model = nn.Sequential(nn.Identity(), *(tree(draw, 3) for _ in range(draw.randint(2, 3))))
    ran: list[str] = []
    watched = copy.deepcopy(model)
    for name, module in watched.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    watched(torch.ones(1, 2, 3, 3))
    found = {
        name.removesuffix(".weight_quantizer"): quantizer.bits
        for name, quantizer in quantizers(quantize_layers(model, QuantSpec(4, 4, edge_bits=8)))
        if "weight" in name
    }
    expected = {name: 8 if name in (ran[0], ran[-1]) else 4 for name in ran}
    assert found == expected
