"""The recipe "equalize": quantization from weights and BatchNorm statistics, without images and without training."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfqlib
from dfqlib import quantizer, recipes
from dfqlib.deploy.saving import load_quantized, save_quantized
from dfqlib.errors import InputError
from dfqlib.models import CifarResNet, ResNet8
from dfqlib.network.inference import Batches, predict
from dfqlib.quantizer import QuantSpec, StepQuantizer
from dfqlib.recipes import base

SHAPE = (1, 16, 16)


def equalized(model: nn.Module, bits: Any = "w4a4", shape: Any = SHAPE, **settings: Any) -> dfqlib.Report:
    return dfqlib.quantize(model, shape, bits, recipe="equalize", progress=False, **settings)


class Inverted(nn.Module):
    """ReLU6 and a sum, as in MobileNetV2, and at the end of the block a convolution without BatchNorm and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 1, 1, bias=False)
        self.relu = nn.ReLU6()
        self.head = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.depthwise(self.relu(self.bn1(self.expand(x))))))
        return self.head(torch.flatten(x + self.project(out), 1))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)
    )


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("bits", ["w4a4", "w3a3"])
def test_it_beats_largest_magnitude_calibration(teacher: nn.Module, digits: Batches, bits: str) -> None:
    network = quantizer.quantize_layers(teacher, QuantSpec.parse(bits))
    quantizer.calibrate(network, torch.randn(64, *SHAPE), "max")
    report = equalized(teacher, bits)
    assert report.seconds < 10
    assert dfqlib.evaluate(report.model, digits) > 98.5
    images, _ = dfqlib.data.images_and_labels(digits)
    logits = predict(teacher, images)
    errors = [float((predict(model, images) - logits).square().mean()) for model in (network, report.model)]
    assert errors[1] < 0.75 * errors[0]


def test_each_step_earns_its_place_at_three_bits(teacher: nn.Module, digits: Batches) -> None:
    without = equalized(teacher, "w3a3", iterations=0, absorb="none", correction="none").model
    corrected = equalized(teacher, "w3a3", iterations=0, absorb="none").model
    both = equalized(teacher, "w3a3").model
    scores = [dfqlib.evaluate(network, digits) for network in (without, corrected, both)]
    assert scores[0] < scores[1] - 3
    assert scores[2] >= scores[1] - 0.5


def test_the_papers_settings_lose_nothing_at_eight_bits(teacher: nn.Module, digits: Batches) -> None:
    report = equalized(teacher, "w8a8", budget="published")
    assert dfqlib.evaluate(report.model, digits) > dfqlib.evaluate(teacher, digits) - 0.3
    ranges = dict(quantizer.quantizers(report.model))
    state = teacher.state_dict()
    relu = ranges["quantize_relu"]
    assert isinstance(relu, StepQuantizer)
    assert float(relu.step * relu.qmax) == pytest.approx(
        float((state["bn1.bias"] + 6 * state["bn1.weight"].abs()).max()), rel=1e-4
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"correction": "images", "ranges": "images", "bias_bits": 16, "absorb": "all", "clip": "max"},
        {"rounding": "adaround", "rounding_steps": 5, "synthesis_steps": 2, "images": 8},
    ],
)
def test_a_report_says_how_to_run_it_again(teacher: nn.Module, changes: dict[str, Any]) -> None:
    report = equalized(teacher, "w3a4", **changes)
    keep = inspect.signature(dfqlib.quantize).parameters
    known = {name: value for name, value in report.settings.items() if name in keep and name != "model"}
    chosen = {name: report.settings[name] for name in vars(recipes.find("equalize", "quantize", "quick", {})[1])}
    spec = report.settings["spec"]
    again = dfqlib.quantize(teacher, bits=spec, progress=False, **{**known, "image_shape": SHAPE}, **chosen)
    assert same(report.model, again.model)
    assert torch.equal(report.images, again.images)


def test_a_known_architecture_is_saved_by_its_name(teacher: nn.Module, tmp_path: Path) -> None:
    report = equalized(teacher, "w3a4")
    network = load_quantized(save_quantized(report, tmp_path / "q.pt", arch="digits_resnet8"))
    assert same(network, report.model)
    assert torch.equal(network(report.images), report.model(report.images))
    again = load_quantized(save_quantized(network, tmp_path / "again.pt"), ResNet8())
    assert same(again, report.model)


@pytest.mark.parametrize("relu6", ["keep", "replace"])
def test_a_changed_architecture_is_rebuilt_from_what_the_file_says(relu6: str, tmp_path: Path) -> None:
    model = Inverted().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 3.0, 0.5)
    report = equalized(model, relu6=relu6, absorb="all")
    assert report.model.meta["changes"] == {"relu6": relu6, "biases": ["project"]}  # type: ignore[union-attr, comparison-overlap]
    network = load_quantized(save_quantized(report, tmp_path / "q.pt"), Inverted())
    assert same(network, report.model)
    images = 10 * torch.randn(8, *SHAPE)
    assert torch.equal(network(images), report.model(images))
    again = load_quantized(save_quantized(network, tmp_path / "again.pt"), Inverted())
    assert torch.equal(again(images), report.model(images))


def test_it_works_without_batchnorm_and_the_message_that_says_so_is_true() -> None:
    model = plain()
    report = equalized(model, "w8a8", (1, 16, 16))
    x = torch.randn(32, *SHAPE)
    expected = model(x).detach()
    assert float((report.model(x) - expected).square().mean() / expected.var()) < 1e-2
    for name in base.RECIPES_WITHOUT_BATCHNORM:
        verb = "quantize" if name == "equalize" else "distill"
        method, _ = recipes.find(name, verb, "quick", {})
        assert not method.NEEDS_BATCHNORM
    with pytest.raises(InputError, match="BatchNorm"):
        equalized(model, synthesis_steps=2)


def test_affine_quantizers_take_their_bounds_from_the_statistics(teacher: nn.Module, digits: Batches) -> None:
    spec = QuantSpec(4, 4, scheme="affine", granularity="channel", step="fixed")
    assert dfqlib.evaluate(equalized(teacher, spec).model, digits) > 98


def test_the_model_passed_in_stays_as_it_is() -> None:
    model = CifarResNet(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    equalized(model, shape=(3, 32, 32), images=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_weights_without_a_step_are_not_rounded_by_training(teacher: nn.Module) -> None:
    with pytest.raises(InputError, match='scheme="affine": AdaRound needs a step per weight; take scheme="symmetric"'):
        equalized(teacher, QuantSpec(scheme="affine"), rounding="adaround")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias_bits": 8}, 'bias_bits=8 must be "16" or "32"'),
        ({"absorb": "some"}, 'absorb=\'some\' must be "unpadded" or "all" or "none"'),
        ({"deviations": 0}, "deviations=0 must be a number of at least 0.1"),
        ({"images": 1}, "images=1 must be a whole number of at least 2"),
        ({"iterations": 1.5}, "iterations=1.5 must be a whole number"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str, teacher: nn.Module) -> None:
    with pytest.raises(InputError, match=message):
        equalized(teacher, **settings)
