"""Reading, fixing and folding BatchNorm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import batchnorm
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.network import folding
from dfqlib.recipes import base


class Network(nn.Module):
    """A convolution without BatchNorm, layers out of order, one called twice, one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.last_norm = nn.BatchNorm1d(5)
        self.plain = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.plain(x)))
        x = self.stateless(self.norm(F.relu(x)))
        return self.last_norm(self.fc(x.mean((2, 3))))


@pytest.fixture
def network() -> nn.Module:
    return _randomize(Network()).eval()


def _randomize(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts that are not those of initialization."""
    for layer in batchnorm.layers(model).values():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        for tensor, low in (
            (layer.running_mean, -1),
            (layer.running_var, 0.5),
            (layer.weight, -1),
            (layer.bias, -1),
        ):
            nn.init.uniform_(tensor, low, 1.5)
    return model


def test_layers_are_those_with_running_statistics(network: nn.Module) -> None:
    assert list(batchnorm.layers(network)) == ["last_norm", "norm"]


def test_probe_records_each_call_in_the_order_of_execution(network: nn.Module) -> None:
    with BatchNormProbe(network) as probe:
        for _ in range(2):  # the second pass replaces the first
            network(torch.randn(6, 3, 8, 8))
        assert [layer.name for layer in probe] == ["norm", "norm", "last_norm"]
        assert len(probe) == 3
        first = next(iter(probe))
    assert first.stored_mean is network.norm.running_mean
    assert first.input.shape == (6, 4, 8, 8)


def test_hooks_are_gone_afterwards(network: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="channels"), BatchNormProbe(network):
        network(torch.randn(2, 7, 8, 8))
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_statistics_are_those_of_torch(network: nn.Module, memory_format: torch.memory_format) -> None:
    images = torch.randn(6, 3, 8, 8).contiguous(memory_format=memory_format)
    with BatchNormProbe(network) as probe:
        network(images)
        layer, _, vector = probe
        x = layer.input
        torch.testing.assert_close(layer.mean(), x.mean((0, 2, 3)))
        torch.testing.assert_close(layer.var(), x.var((0, 2, 3), correction=0))
        torch.testing.assert_close(layer.var(unbiased=True), x.var((0, 2, 3)))
        torch.testing.assert_close(layer.mean(per_sample=True), x.mean((2, 3)))
        torch.testing.assert_close(layer.var(per_sample=True), x.var((2, 3), correction=0))
        torch.testing.assert_close(layer.var(per_sample=True, unbiased=True), x.var((2, 3)))
        torch.testing.assert_close(vector.var(), vector.input.var(0, correction=0))


def test_variance_does_not_cancel_far_from_zero() -> None:
    x = torch.randn(64, 2, 8, 8) * 0.01 + 1000
    _, var = batchnorm.LayerInput("", x, torch.zeros(2), torch.ones(2), 1e-5).statistics()
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 5)])
def test_the_fast_statistics_and_their_gradient_are_those_of_the_plain_form(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for statistics in (batchnorm.batch_statistics, batchnorm._BatchStatistics.apply):
        mean, var = statistics(leaf := x.clone().requires_grad_())
        (mean.exp() * var).sum().backward()
        results.append((mean.detach(), var.detach(), leaf.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 5)])
def test_gradient_of_the_statistics(shape: tuple[int, ...]) -> None:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return batchnorm.LayerInput("", x, torch.zeros(3), torch.ones(3), 1e-5).statistics()

    assert torch.autograd.gradcheck(statistics, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_a_copy_made_under_the_probe_is_not_recorded(network: nn.Module) -> None:
    images = torch.randn(2, 3, 8, 8)
    with BatchNormProbe(network) as probe:
        network(images)
        seen = [layer.input for layer in probe]
        copy.deepcopy(network)(images)
        assert [layer.input for layer in probe] == seen


def test_an_unused_probe_says_what_to_do(network: nn.Module) -> None:
    with BatchNormProbe(network) as probe, pytest.raises(InputError, match="call the model"):
        list(probe)


def test_one_value_has_no_unbiased_variance(network: nn.Module) -> None:
    with BatchNormProbe(network) as probe:
        network(torch.randn(1, 3, 8, 8))
        *_, vector = probe
        with pytest.raises(InputError, match="last_norm"):
            vector.var(unbiased=True)


def test_an_overwritten_input_is_noticed() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + x.relu_()

    model = Overwrites().eval()
    with torch.no_grad(), BatchNormProbe(model) as probe:
        model(torch.randn(2, 3, 4, 4))
        with pytest.raises(InputError, match="overwritten"):
            list(probe)


def test_a_network_without_batchnorm_is_refused() -> None:
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(InputError, match="BatchNorm"):
        BatchNormProbe(model)
    with pytest.raises(InputError, match="recipe='zeroq'"):
        base.require_batchnorm(model, "zeroq")


def test_require_accepts_a_network_with_batchnorm(network: nn.Module) -> None:
    base.require_batchnorm(network, "zeroq")


def test_frozen_statistics_survive_training_mode(network: nn.Module) -> None:
    model = copy.deepcopy(network)
    batchnorm.freeze(model)
    batchnorm.freeze(model)
    before = copy.deepcopy(model.norm.state_dict())
    images = torch.randn(6, 3, 8, 8)
    expected = model.norm(model.conv(model.plain(images)))
    model.train()
    loss = model(images).square().sum()
    loss.backward()
    assert model.conv.training
    torch.testing.assert_close(model.norm.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(model.norm(model.conv(model.plain(images))), expected, rtol=0, atol=0)
    assert model.norm.weight.grad is not None
    assert model.norm.weight.grad.abs().sum() > 0
    assert len(model.norm._forward_pre_hooks) == 1


class Foldable(nn.Module):
    """A strided and grouped convolution, a transposed one and a linear layer, BatchNorm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2),
            nn.BatchNorm2d(6),
        )
        self.fc = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(F.relu(self.features(x)).mean((2, 3))))


def test_folding_leaves_the_outputs_as_they_are() -> None:
    model = _randomize(Foldable()).eval()
    before = copy.deepcopy(model.state_dict())
    folded = folding.merge(model)
    images = torch.randn(3, 4, 9, 9)
    assert list(batchnorm.layers(folded)) == ["features.4"]  # behind the transposed convolution
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_folding_leaves_what_has_two_uses(network: nn.Module) -> None:
    folded = folding.merge(network)
    images = torch.randn(3, 3, 8, 8)
    assert list(batchnorm.layers(folded)) == ["norm"]  # called twice; last_norm is folded into fc
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-5)


def test_folding_what_cannot_be_traced_says_so() -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match=r"torch\.fx"):
        folding.merge(Dynamic())
