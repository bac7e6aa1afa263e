"""Equalization changes the weights and not the network; bias correction restores what rounding shifts on average."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.errors import InputError
from dfqlib.models import CifarResNet, ResNet8
from dfqlib.network import folding
from dfqlib.network.folding import Folded, fold
from dfqlib.posttraining import equalization
from dfqlib.posttraining.correction import correct_biases, expected_inputs, measured_inputs, round_bias, round_biases
from dfqlib.posttraining.equalization import absorb, equalize, find_pairs, high_bias, pair_scales, triple_scales
from dfqlib.posttraining.moments import ClippedNormal, propagate, set_ranges
from dfqlib.quantizer import QuantSpec, calibrate, quantize_layers, quantizers


class Separable(nn.Module):
    """MobileNetV2's block: expand, depthwise, project, with a sum around it."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), activation())
        self.block = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), activation(),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), activation(),
            nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class LeNet(nn.Module):
    """No BatchNorm; pooling and a flattened feature map of several pixels between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 4, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))


class Grouped(nn.Module):
    """A grouped convolution that is not depthwise, and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 12, 3, groups=4)
        self.twice = nn.Conv2d(12, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.second(F.relu(self.first(x))))
        x = self.twice(F.relu(self.twice(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(x), 1), 1))


def trained(model: nn.Module, spread: float = 1.0) -> nn.Module:
    """Uneven channels and BatchNorm statistics such as training leaves, some scales negative."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scales = torch.exp(spread * torch.randn(module.weight.shape[0]))
            module.weight.data.mul_(scales.view(-1, *[1] * (module.weight.ndim - 1)))
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.weight, 1.0, 0.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def images(count: int = 4, channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(count, channels, size, size)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.detach().abs().max()))


def chain(*scales: float) -> nn.Sequential:
    """Two 1x1 convolutions around a ReLU; the first's channels have the given ranges."""
    model = nn.Sequential(nn.Conv2d(1, len(scales), 1), nn.ReLU(), nn.Conv2d(len(scales), 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(scales).view(-1, 1, 1, 1))
        model[2].weight.fill_(1.0)
    return model


NETWORKS = {
    "residual": lambda: CifarResNet(8), "mobile": Separable, "no BatchNorm": LeNet, "grouped": Grouped,
    "ReLU6": lambda: Separable(nn.ReLU6), "tiny": lambda: chain(4.0, 0.25),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_and_equalization_leave_the_output_and_the_names_as_they_are(name: str) -> None:
    model = trained(NETWORKS[name]())
    x = images(channels=1 if name == "tiny" else 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold(model)
    assert same(folded.network(x), model(x))
    equalize(folded)
    assert same(folded.network(x), model(x))
    assert list(folded.network.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def pair_names(model: nn.Module, **options: Any) -> list[tuple[str, str]]:
    return [(pair.first.name, pair.second.name) for pair in find_pairs(fold(model, **options))]


def test_pairs_are_what_only_homogeneous_operations_connect() -> None:
    block = ("block.0", "block.3"), ("block.3", "block.6")
    assert pair_names(Separable()) == list(block)
    assert pair_names(Separable(nn.ReLU6)) == []
    assert pair_names(Separable(nn.ReLU6), relu6="replace") == list(block)
    assert pair_names(Separable(nn.SiLU)) == []
    assert pair_names(LeNet()) == [("conv1", "conv2"), ("conv2", "fc1"), ("fc1", "fc2")]
    assert pair_names(Grouped()) == [("first", "second")]
    assert pair_names(CifarResNet(8)) == [(f"layer{i}.0.conv1", f"layer{i}.0.conv2") for i in (1, 2, 3)]


def test_folding_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    model[0].weight.data.fill_(3.0)
    model[0].bias.data.fill_(1.0)
    norm: Any = model[1]
    norm.weight.data.fill_(2.0)
    norm.bias.data.fill_(-0.5)
    norm.running_mean.fill_(0.25)
    norm.running_var.fill_(4.0 - norm.eps)
    folded = fold(model)
    layer = folded.layers["0"]
    assert layer.module.weight.item() == pytest.approx(3.0)  # 3 * 2 / sqrt(4)
    assert layer.bias().item() == pytest.approx(0.25)  # (1 - 0.25) * 2 / 2 - 0.5
    assert [value.item() for value in folded.statistics["1"]] == [-0.5, 2.0]


def test_scales_give_both_layers_the_same_range() -> None:
    first, second = torch.tensor([8.0, 1.0, 0.0, 3.0]), torch.tensor([2.0, 4.0, 1.0, 0.0])
    scales = pair_scales(first, second)
    assert scales.tolist() == [2.0, 0.5, 1.0, 1.0]  # sqrt(8 * 2) / 2, sqrt(1 * 4) / 4, and 1 where a channel is dead
    assert torch.equal((first / scales)[:2], (second * scales)[:2])


def test_scales_around_a_depthwise_layer_give_three_the_same_range() -> None:
    first, middle, last = torch.tensor([8.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([27.0, 1.0])
    before, after = triple_scales(first, middle, last)
    ranges = [first / before, middle * before / after, last * after]
    assert [float(r[0]) for r in ranges] == pytest.approx([6.0, 6.0, 6.0])
    assert before[1] == after[1] == 1


def test_equalization_by_hand() -> None:
    folded = fold(chain(4.0, 0.25))
    assert equalize(folded) == 2  # the second pass finds nothing to move
    assert folded.layers["0"].module.weight.flatten().tolist() == [2.0, 0.5]
    assert folded.layers["2"].module.weight.flatten().tolist() == [2.0, 0.5]


def test_a_dead_channel_is_not_blown_up() -> None:
    """Its weights are next to nothing and its bias is not: dividing both by a tiny scale would ruin the range."""
    folded = fold(chain(4.0, 1e-12))
    folded.layers["0"].module.bias.data.fill_(1.0)
    equalize(folded)
    assert folded.layers["0"].bias().tolist() == [0.5, 1.0]


def test_statistics_follow_the_scales() -> None:
    model = trained(Separable(), spread=2.0)
    folded = fold(model)
    before = folded.statistics["block.1"][1]
    equalize(folded)
    x = images(64)
    plain, equalized = (spread_of(network, "block.1", x) for network in (model, folded.network))
    assert torch.allclose(before / folded.statistics["block.1"][1], plain / equalized, rtol=1e-3)
    ranges = [equalization.output_ranges(folded.layers[name]) for name in ("block.0", "block.3")]
    assert torch.allclose(*ranges, rtol=1e-2)


def spread_of(network: nn.Module, name: str, x: Tensor) -> Tensor:
    """Deviation of each channel that a module puts out."""
    found: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda *call: found.append(call[2].detach()))
    network(x)
    handle.remove()
    return found[0].std((0, 2, 3))


def weight_error(folded: Folded, bits: int, x: Tensor) -> float:
    """Relative error of the output with weights in ``bits`` bits, one step per tensor."""
    network = quantize_layers(folded.network, QuantSpec(bits, 16, bits, step="fixed"))
    calibrate(network, x, "max")
    with torch.no_grad():
        exact = folded.network(x)
        return float((network(x) - exact).square().mean() / exact.square().mean())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("build", [LeNet, Separable])
def test_uneven_channels_need_fewer_bits_after_equalization(bits: int, build: Any) -> None:
    model, x = trained(build(), spread=0.1), images(16)
    folded = fold(model)
    for pair in find_pairs(folded):
        uneven = torch.exp(2 * torch.randn(pair.first.channels))
        pair.first.scale_outputs(uneven)
        pair.second.scale_inputs(1 / uneven)
    assert same(folded.network(x), model(x))
    before = weight_error(folded, bits, x)
    equalize(folded)
    assert weight_error(folded, bits, x) < before / 4


def test_high_biases_are_what_lies_beyond_three_deviations() -> None:
    mean, std = torch.tensor([5.0, 1.0, -4.0]), torch.tensor([1.0, 1.0, 0.5])
    assert high_bias(mean, std).tolist() == [2.0, 0.0, 0.0]


def absorbing(padding: int = 0) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=padding, bias=False)
    ).eval()
    norm: Any = model[1]
    norm.bias.data.copy_(torch.tensor([8.0, 1.0]))
    model[0].weight.data.clamp_(-0.5, 0.5)
    return model


def test_absorption_moves_a_high_bias_on_and_keeps_the_output() -> None:
    model, x = absorbing(), images(channels=1)
    folded = fold(model)
    absorbed = absorb(folded)
    assert absorbed["0"].tolist() == [5.0, 0.0]
    assert folded.statistics["1"][0].tolist() == [3.0, 1.0]
    gained = folded.layers["3"].bias()
    assert torch.allclose(gained, model[3].weight[:, 0].sum((1, 2)) * 5, atol=1e-5)
    assert same(folded.network(x), model(x))
    activations = [F.relu(network[:3](x)).amax() for network in (model, _sequence(folded.network))]
    assert activations[1] < activations[0] - 3
    assert folding.changes(folded.network, model, "keep")["biases"] == ["3"]


def _sequence(network: fx.GraphModule) -> nn.Sequential:
    return nn.Sequential(*(network.get_submodule(str(index)) for index in range(4)))


def test_absorption_across_zero_padding_shows_at_the_border_only_and_when_asked() -> None:
    model, x = absorbing(padding=1), images(channels=1)
    folded = fold(model)
    assert absorb(folded) == {}
    assert absorb(folded, padded=True).keys() == {"0"}
    difference = (folded.network(x) - model(x)).detach().abs()
    assert float(difference[:, :, 1:-1, 1:-1].max()) < 1e-4
    assert float(difference[:, :, 0].max()) > 0.1


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf), (-1.0, 0.5)])
def test_the_moments_of_a_clipped_normal_variable_are_those_of_samples(low: float, high: float) -> None:
    mean, std = torch.tensor([0.0, -2.0, 5.0, 1.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    samples = (mean + std * torch.randn(400_000, 4)).clamp(low, high)
    value = ClippedNormal.free(mean, std).clip(low, high)
    assert torch.allclose(value.expectation(), samples.mean(0).double(), atol=1e-2)
    assert torch.allclose(value.variance(), samples.var(0).double(), atol=2e-2)


def test_the_mean_after_a_relu_by_hand() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    assert float(ClippedNormal.free(zero, one).clip(0, math.inf).expectation()) == pytest.approx(0.3989423)
    assert ClippedNormal.free(torch.tensor([1.0, -9.0]), torch.tensor([2.0, 0.5])).clip(0, 6).range(6) == (0.0, 6.0)


def test_moments_pass_sums_padding_and_pooling() -> None:
    folded = fold(CifarResNet(8))
    known = {node.name: value for node, value in propagate(folded.network, folded.statistics).items()}
    assert set(folded.layers) - expected_inputs(folded.network, folded.statistics).keys() == {"conv1"}
    half = 0.3989423  # a standard normal variable after its ReLU
    assert torch.allclose(known["relu"].expectation(), torch.tensor(half).double(), atol=1e-6)
    assert torch.allclose(known["add"].expectation(), torch.tensor(half).double(), atol=1e-6)
    assert torch.allclose(known["add"].variance(), torch.tensor(1 + 0.5 - half**2).double(), atol=1e-5)
    padded = known["layer2_0_shortcut"] if "layer2_0_shortcut" in known else known["pad"]
    assert padded.expectation()[:8].abs().max() == 0
    assert float(padded.expectation()[8]) > 0


def test_ranges_reach_six_deviations_and_what_nothing_tells_is_left() -> None:
    folded = fold(CifarResNet(8))
    network = quantize_layers(folded.network, QuantSpec(step="fixed"))
    calibrate(network, images())
    left = set_ranges(network, folded.statistics)
    found = {name: quantizer for name, quantizer in quantizers(network) if name.startswith("quantize_")}
    assert left == [name for name in found if name.endswith("_x") or name == "quantize_input"]
    relu: Any = found["quantize_relu"]
    assert float(relu.step) == pytest.approx(6.0 / 15)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_bias_correction_restores_the_mean_of_every_layer(scheme: Any) -> None:
    model = trained(LeNet())
    folded, x = fold(model), images(64)
    spec = QuantSpec(3, 16, 3, step="fixed", scheme=scheme)
    network = quantize_layers(folded.network, spec)
    calibrate(network, x, "max")
    inputs = measured_inputs(folded.network, x)
    layer = folded.layers["conv2"]
    feature = F.max_pool2d(F.relu(model.conv1(x)), 2)  # type: ignore[operator]
    assert torch.allclose(inputs["conv2"], feature.mean((0, 2, 3)), atol=1e-6)
    student: Any = network.conv2

    def gap() -> float:
        out = student._conv_forward(feature, student.weight_quantizer(student.weight), student.bias)
        return float((out - layer.module(feature)).detach().mean((0, 2, 3)).abs().max())

    before = gap()
    corrections = correct_biases(network, folded.network, inputs)
    assert set(corrections) == {"conv1", "conv2", "fc1", "fc2"}
    assert gap() < before / 5


def test_bias_correction_by_hand() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False)).eval()
    model[2].weight.data.fill_(1.0)
    folded = fold(model)
    network = quantize_layers(folded.network, QuantSpec(4, 8, 4, step="fixed"))
    calibrate(network, images(channels=1))
    network.get_submodule("2").weight_quantizer.step.fill_(0.4)  # type: ignore[union-attr, operator]
    corrections = correct_biases(network, folded.network, expected_inputs(folded.network, folded.statistics))
    assert corrections["2"].item() == pytest.approx((0.8 - 1.0) * 0.3989423, abs=1e-6)
    assert network.get_submodule("2").bias.item() == pytest.approx(0.2 * 0.3989423, abs=1e-6)  # type: ignore[union-attr, operator]


def test_biases_of_16_bits_cost_nothing_and_of_few_bits_much() -> None:
    bias = torch.tensor([1.0, -0.3, 0.01])
    assert torch.equal(round_bias(bias, 0.25, 32), torch.tensor([1.0, -0.25, 0.0]))
    # Codes 100 and -30 do not fit 4 bits (at most 7): the grid widens 16-fold.
    assert torch.allclose(round_bias(bias, 0.01, 4), torch.tensor([0.96, -0.32, 0.0]))
    with pytest.raises(InputError, match="bits=40 must be from 2 to 32"):
        round_bias(bias, 0.1, 40)
    model, x = trained(CifarResNet(8)), images()
    folded = fold(model)
    errors = {}
    for bits in (32, 16, 4):
        network = quantize_layers(folded.network, QuantSpec(8, 8, step="fixed"))
        calibrate(network, x)
        exact = network(x).detach()
        assert set(round_biases(network, bits)) == set(folded.layers)
        errors[bits] = float((network(x).detach() - exact).abs().max() / exact.abs().max())
    assert errors[32] < 0.02
    assert errors[16] < 0.05
    assert errors[4] > 3 * errors[16]


def test_replacing_relu6_changes_the_output_only_where_it_was_cut() -> None:
    model = trained(Separable(nn.ReLU6))
    x, norm = images(), model.get_submodule("stem.1")
    replaced = fold(model, "replace").network
    assert not any(isinstance(module, nn.ReLU6) for module in replaced.modules())
    low = trained(Separable(nn.ReLU6), spread=0.0)
    for module in low.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.0, 0.1)
    assert same(fold(low, "replace").network(x), low(x))
    norm.bias.data.add_(20.0)  # type: ignore[union-attr, operator]
    assert not same(fold(model, "replace").network(x), model(x))
    assert folding.changes(replaced, model, "replace") == {"relu6": "replace", "biases": []}


def test_quantizers_are_found_by_the_names_of_the_model() -> None:
    for model in (ResNet8(), Separable(), LeNet(), Grouped()):
        ours, theirs = (quantize_layers(m, QuantSpec()).state_dict() for m in (fold(model).network, model))
        assert ours.keys() == theirs.keys()
