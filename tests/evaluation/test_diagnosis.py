"""Facts about where bits are lost: what the diagnosis must see in networks broken on purpose."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor, nn

import dfqlib
from dfqlib.errors import InputError
from dfqlib.evaluation.diagnosis import diagnose
from dfqlib.evaluation.sensitivity import Sensitivity, sensitivity
from dfqlib.quantizer import QuantSpec, StepQuantizer, calibrate, quantize_layers, quantizers

mpl.use("agg")


@dataclass
class Report:
    model: nn.Module
    images: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)
    calibrated: nn.Module | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return dfqlib.data.images_and_labels(dfqlib.load_data("digits"), limit=100)[0]


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return dfqlib.load_model("digits_resnet8")


def quantized(teacher: nn.Module, images: Tensor, bits: Any = "w8a8") -> nn.Module:
    network = quantize_layers(teacher, QuantSpec.parse(bits))
    calibrate(network, images)
    return network


def test_a_sound_network_has_nothing_that_stands_out(teacher: nn.Module, images: Tensor) -> None:
    network = quantized(teacher, images)
    found = diagnose(Report(network, images, calibrated=network))
    assert found.agreement == found.calibrated_agreement == 100
    assert min(found.sqnr.values()) > 20
    assert set(found.steps.values()) == {1.0}
    assert max(found.clipped.values()) < 0.05
    assert len(found.advice()) == 1
    assert "nothing stands out" in str(found)


def test_a_layer_of_two_bits_is_the_weakest(teacher: nn.Module, images: Tensor) -> None:
    layer = "layer2.0.conv2"
    network = quantized(teacher, images, {"default": "w8a8", layer: 2})
    found = diagnose(Report(network, images, calibrated=network))
    assert min(found.own_sqnr, key=lambda name: found.own_sqnr[name]) == layer
    assert layer in found.advice()[0]


def test_a_step_that_shrank_is_seen_as_moved_and_as_clipping(teacher: nn.Module, images: Tensor) -> None:
    calibrated, network = (quantized(teacher, images) for _ in range(2))
    with torch.no_grad():
        network.get_parameter("quantize_relu_1.step").mul_(0.01)
    found = diagnose(Report(network, images, calibrated=calibrated))
    assert found.clipped["quantize_relu_1"] > 0.3
    assert found.steps["quantize_relu_1"] == pytest.approx(0.01)
    assert any("quantize_relu_1 lies beyond" in line for line in found.advice())
    assert any("the step size of quantize_relu_1 changed 0.01-fold" in line for line in found.advice())


def test_one_exploding_channel_is_seen_though_the_layer_as_a_whole_looks_well(images: Tensor) -> None:
    teacher = dfqlib.load_model("digits_resnet8")
    with torch.no_grad():  # BatchNorm takes the factor out again: in floating point nothing has happened
        teacher.get_parameter("layer2.0.conv1.weight")[0] *= 300
        teacher.get_buffer("layer2.0.bn1.running_mean")[0] *= 300
        teacher.get_buffer("layer2.0.bn1.running_var")[0] *= 300**2
    found = diagnose(Report(quantized(teacher, images, "w4a4"), images))
    assert found.own_sqnr["layer2.0.conv1"] > found.channel_sqnr["layer2.0.conv1"] + 10
    assert any("channels of layer2.0.conv1" in line and 'recipe="equalize"' in line for line in found.advice())


def test_advice_speaks_of_the_widths_at_hand(teacher: nn.Module, images: Tensor) -> None:
    found = diagnose(Report(quantized(teacher, images, "w2a3"), images))
    assert found.bits == "w2a3"
    assert '{"default": "w2a3"' in str(found)


def test_steps_are_followed_through_the_training(teacher: nn.Module, tmp_path: Path) -> None:
    report = dfqlib.quantize(teacher, (1, 16, 16), "w3a3", images=16, synthesis_steps=2, steps=20, progress=False)
    found = diagnose(report)
    assert set(found.step_history) == set(found.steps)
    for name, history in found.step_history.items():
        assert (history[0], len(history)) == (1.0, 3)
        assert history[-1] == pytest.approx(found.steps[name], rel=1e-5)
    found.figure().savefig(tmp_path / "figure.png")


def test_dead_channels_are_counted(images: Tensor) -> None:
    teacher = dfqlib.load_model("digits_resnet8")
    with torch.no_grad():
        teacher.get_parameter("layer1.0.bn1.weight")[:3] = 0
    assert diagnose(Report(quantized(teacher, images), images)).dead["layer1.0.bn1"] == 3


def test_losses_of_the_last_phase_are_read_and_drawn(teacher: nn.Module, images: Tensor, tmp_path: Path) -> None:
    rows = [{"phase": "synthesis", "step": 1, "seconds": 0.1, "bn": 9.0}]
    rows += [{"phase": "fine-tuning", "step": i, "seconds": 1.0, "loss": loss} for i, loss in enumerate((3, 1, 1, 4.0))]
    found = diagnose(Report(quantized(teacher, images), images, rows))
    assert found.losses == {"loss": [3, 1, 1, 4]}
    assert any('the loss "loss" ended at 4' in line for line in found.advice())
    found.figure().savefig(tmp_path / "figure.png")


def test_what_is_no_quantized_network_is_refused(teacher: nn.Module, images: Tensor) -> None:
    with pytest.raises(InputError, match="a distilled student has no quantizers"):
        diagnose(Report(teacher, images))
    with pytest.raises(InputError, match="must each have at least one"):
        sensitivity(teacher, images[:0])


def test_more_bits_hurt_less_and_a_budget_is_kept(teacher: nn.Module, images: Tensor) -> None:
    found = sensitivity(teacher, images, (2, 4, 8))
    assert sum(found.weights.values()) == sum(
        m.weight.numel() for m in teacher.modules() if isinstance(m, nn.Conv2d | nn.Linear)
    )
    assert all(losses[2] > losses[8] for losses in found.losses.values())
    sizes, losses, _ = zip(*found.pareto(), strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(losses) == sorted(losses, reverse=True)
    budget = (sizes[0] + sizes[-1]) / 2
    bits = found.bits_for(budget)
    assert sum(found.weights[name] * width / 8 for name, width in bits.items()) <= budget
    network = quantize_layers(teacher, QuantSpec.parse({"default": "w4a4", **bits}))
    widths = {
        name.removesuffix(".weight_quantizer"): q.bits
        for name, q in quantizers(network)
        if isinstance(q, StepQuantizer)
    }
    assert {name: widths[name] for name in bits} == bits
    with pytest.raises(InputError, match="what 2 bits need"):
        found.bits_for(10)


def test_a_byte_goes_where_it_lowers_the_loss_most() -> None:
    found = Sensitivity({"a": 80, "b": 80}, (2, 4), {"a": {2: 1.0, 4: 0.0}, "b": {2: 0.1, 4: 0.0}})
    assert found.ranking() == ["a", "b"]
    assert found.bits_for(60) == {"a": 4, "b": 2}
    assert found.bits_for(1000) == {"a": 4, "b": 4}


def test_widths_by_layer_are_checked(teacher: nn.Module) -> None:
    with pytest.raises(InputError, match='no layer is called "conv9"; the layers are conv1'):
        quantize_layers(teacher, QuantSpec.parse({"conv9": 8}))
    with pytest.raises(InputError, match='"conv1" has 1 bits; give a whole number from 2 to 16'):
        QuantSpec.parse({"conv1": 1})
    spec = QuantSpec.parse({"default": "w3a5", "conv1": 6})
    assert (spec.weight_bits, spec.activation_bits, spec.layers) == (3, 5, (("conv1", 6),))
