"""``dfqlib.quantize`` from end to end: the network it makes, what it leaves alone, and what it refuses."""

import copy
import dataclasses
import hashlib
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from cifar100_resnet20 import MEAN, STD, Cifar100ResNet20
from torch import Tensor, nn
from torch.nn import functional as F

import dfqlib
from dfqlib import losses
from dfqlib.errors import InputError, NonFiniteError
from dfqlib.quantizer import integer_range, quantizers
from dfqlib.recipes import Report, express

SHAPE = (1, 16, 16)
TINY: dict[str, Any] = {"images": 8, "synthesis_steps": 3, "steps": 12, "batch": 4, "progress": False}


def fingerprint(network: nn.Module, *tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for name, value in [*network.state_dict().items(), *(("", tensor) for tensor in tensors)]:
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def teacher() -> nn.Module:
    return dfqlib.load_model("digits_resnet8")


SMALL = {"images": 64, "synthesis_steps": 60, "steps": 100, "batch": 32}
"""A tenth of the default budget."""


@pytest.fixture(scope="module")
def two_bits() -> Report:
    """Two-bit digits in a few seconds."""
    torch.set_num_threads(1)
    return dfqlib.quantize(dfqlib.load_model("digits_resnet8"), SHAPE, "w2a2", progress=False, **SMALL)


# The network it makes


def test_two_bits_are_lost_by_calibration_and_won_back_without_data(two_bits: Report) -> None:
    digits = dfqlib.load_data("digits")
    assert two_bits.calibrated is not None
    assert dfqlib.evaluate(two_bits.calibrated, digits) <= 30
    assert dfqlib.evaluate(two_bits.model, digits) >= 75


@pytest.mark.slow
def test_two_bits_are_nearly_perfect_at_the_default_budget() -> None:
    """As a newcomer runs it."""
    report = dfqlib.quantize(dfqlib.load_model("digits_resnet8"), image_shape=SHAPE, bits="w2a2", progress=False)
    digits, quick = dfqlib.load_data("digits"), express.BUDGETS["quick"]
    assert report.calibrated is not None
    assert dfqlib.evaluate(report.calibrated, digits) <= 30
    assert dfqlib.evaluate(report.model, digits) >= 95
    assert report.images.shape == (quick.images, *SHAPE)
    assert 0 < report.seconds < 600
    assert {name: report.settings[name] for name in vars(quick)} == vars(quick)


def test_the_report_has_everything_to_run_it_again(two_bits: Report) -> None:
    assert two_bits.images.shape == (SMALL["images"], *SHAPE)
    assert torch.isfinite(two_bits.images).all()
    assert two_bits.seconds > 0
    assert not two_bits.interrupted
    settings = two_bits.settings
    expected = {"recipe": "express", "budget": "quick", "seed": 0, "image_shape": [1, 16, 16]}
    expected |= dataclasses.asdict(express.BUDGETS["quick"]) | SMALL
    assert {name: settings[name] for name in expected} == expected
    assert settings["spec"] == dfqlib.QuantSpec.parse("w2a2")
    assert settings["model"].startswith("ResNet8 ")
    assert (settings["device"], settings["threads"], settings["torch"]) == ("cpu", 1, torch.__version__)


def test_the_history_follows_each_phase_and_its_losses_fall(two_bits: Report) -> None:
    for phase, steps in (("synthesis", SMALL["synthesis_steps"]), ("fine-tuning", SMALL["steps"])):
        rows = [row for row in two_bits.history if row["phase"] == phase]
        last = rows[-1]["step"]
        assert [row["step"] for row in rows] == list(range(10, last + 1, 10))
        assert last == steps if phase == "fine-tuning" else last > 0.75 * steps  # synthesis may end on its plateau
        assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert all(math.isfinite(value) for row in two_bits.history for value in row.values() if isinstance(value, float))


def test_the_network_stands_ready_and_holds_codes_of_two_bits(two_bits: Report) -> None:
    network, names = two_bits.model, dict(dfqlib.load_model("digits_resnet8").named_modules())
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    widths = set()
    for name, quantizer in quantizers(network):
        assert quantizer.mode == "quantize"
        if "weight" not in name:
            continue
        layer = name.removesuffix(".weight_quantizer")
        assert layer in names
        codes = quantizer(network.get_parameter(f"{layer}.weight")) / quantizer.step
        low, high = integer_range(quantizer.bits, signed=True)
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert low <= codes.round().min()
        assert codes.round().max() <= high
        widths.add(quantizer.bits)
    assert widths == {2, 8}


def test_batchnorm_statistics_stay_the_teachers(two_bits: Report, teacher: nn.Module) -> None:
    ours = two_bits.model.state_dict()
    running = {name: value for name, value in teacher.state_dict().items() if "running" in name}
    assert running
    assert all(torch.equal(ours[name], value) for name, value in running.items())


# Reproducible, and nothing else touched


def test_a_seed_gives_the_same_bits_and_another_seed_other_ones(teacher: nn.Module) -> None:
    def run(seed: int) -> str:
        torch.rand(seed + 1)  # whatever happened before must not matter
        report = dfqlib.quantize(teacher, SHAPE, "w3a3", seed=seed, **TINY)
        return fingerprint(report.model, report.images)

    first = run(0)
    assert run(0) == first
    assert run(1) != first


def test_the_model_passed_in_and_the_random_numbers_are_left_alone(teacher: nn.Module) -> None:
    teacher.train()
    teacher.bn1.eval()  # type: ignore[union-attr, operator]
    before, modes = fingerprint(teacher), [module.training for module in teacher.modules()]
    trainable = [parameter.requires_grad for parameter in teacher.parameters()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    report = dfqlib.quantize(teacher, SHAPE, **TINY)
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    assert fingerprint(teacher) == before
    assert [module.training for module in teacher.modules()] == modes
    assert [parameter.requires_grad for parameter in teacher.parameters()] == trainable
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in report.model.parameters()}
    assert not shared


def test_bits_take_a_spec_and_settings_reach_the_recipe(teacher: nn.Module) -> None:
    spec = dfqlib.QuantSpec(5, 6, edge_bits=7, granularity="channel", skip="float")
    report = dfqlib.quantize(teacher, SHAPE, spec, **TINY)
    assert report.settings["spec"] == spec
    assert {quantizer.bits for name, quantizer in quantizers(report.model) if "weight" in name} == {5, 7}
    assert report.images.shape == (8, *SHAPE)
    assert (report.settings["synthesis_steps"], report.settings["steps"]) == (3, 12)


# Networks of one's own


def test_an_architecture_that_is_not_in_the_library(shared_data: Any) -> None:
    model = dfqlib.load_checkpoint(Cifar100ResNet20(), shared_data / "models" / "resnet20_cifar100.pth")
    folder = dfqlib.image_folder(shared_data / "cifar100" / "test", MEAN, STD)
    images = dfqlib.data.images_and_labels(folder)[0][::9]
    report = dfqlib.quantize(model, (3, 32, 32), "w6a6", images=32, synthesis_steps=4, steps=3, batch=8, progress=False)
    convolutions = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    weights = {n.removesuffix(".weight_quantizer") for n, _ in quantizers(report.model) if "weight" in n}
    assert weights == convolutions
    assert report.model.meta["unquantized"] == []
    assert dfqlib.agreement(report.model, model, images) > 70


class Untraceable(nn.Module):
    """What it does depends on the values, which no graph can show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().mean()) > 1e6:
            return x.flatten(1)[:, :3]
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_a_network_that_cannot_be_traced_is_quantized_at_its_layers() -> None:
    report = dfqlib.quantize(Untraceable(), (1, 8, 8), "w4a4", **TINY)
    weights = {name for name, _ in quantizers(report.model) if name.endswith("weight_quantizer")}
    assert weights == {"network.conv.weight_quantizer", "network.head.weight_quantizer"}


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": "w4"}, r"bits='w4' needs both widths, for example \"w4a4\""),
        ({"bits": 4}, "bits=4 needs both widths"),
        ({"bits": "w1a4"}, "weight_bits=1 must be a whole number from 2 to 16"),
        ({"bits": "w4a99"}, "activation_bits=99 must be"),
        ({"recipe": "magic"}, 'recipe="magic" is unknown; known are .*express'),
        ({"recipe": "base"}, 'recipe="base" is unknown'),
        ({"budget": "huge"}, 'budget="huge" is unknown; known are quick, published'),
        (
            {"stepz": 3},
            'stepz= is no setting of recipe="express", did you mean steps=; it has images',
        ),
        ({"steps": -1}, "steps=-1 must be a whole number of at least 0"),
        ({"images": 2.5}, "images=2.5 must be a whole number of at least 2"),
        ({"lr": "high"}, "lr='high' must be a number of at least 0"),
        ({"lr": math.nan}, "lr=nan must be a number"),
        ({"flip": "yes"}, "flip='yes' must be True or False"),
        ({"cutmix": 1.5}, "cutmix=1.5 must be a number from 0 to 1"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"seed": 0.5}, "seed=0.5 must be a whole number"),
        ({"device": "abacus"}, 'device="abacus" is not available here; use "cpu"'),
        ({"image_shape": (16, 16)}, r"image_shape=\(16, 16\) must be \(channels, height, width\)"),
        ({"image_shape": (1, 16, 0)}, "image_shape="),
        ({"image_shape": 16}, "image_shape=16 must be"),
        ({"image_shape": (3, 16, 16)}, r"cannot take images of shape \(3, 16, 16\) .*check image_shape"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named_with_the_remedy(
    arguments: dict[str, Any], message: str, teacher: nn.Module
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        dfqlib.quantize(teacher, **{"image_shape": SHAPE, **TINY, **arguments})
    assert "\n" not in str(caught.value)


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(InputError, match=r"model=dict must be a torch\.nn\.Module with its weights loaded"):
        dfqlib.quantize({}, SHAPE, **TINY)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not logits of shape"):
        dfqlib.quantize(nn.Conv2d(1, 2, 1), SHAPE, **TINY)


def test_a_recipe_that_reads_batchnorm_needs_some() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(InputError, match=r"BatchNorm.*equalize"):
        dfqlib.quantize(plain, (1, 8, 8), **TINY)


class InPlaceSum(nn.Module):
    """Adds to a tensor that is read again under its other name, which a graph shows as two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        before = x
        x += 1
        return (before * x).mean((2, 3))


def test_a_network_whose_graph_computes_something_else_is_refused() -> None:
    with pytest.raises(InputError, match=r"its traced graph computes something else.*write those lines out of place"):
        dfqlib.quantize(InPlaceSum(), (1, 8, 8), **TINY)


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_var", "linear.bias"])
def test_a_value_that_is_not_finite_is_named(name: str, teacher: nn.Module) -> None:
    teacher.state_dict()[name].view(-1)[0] = torch.inf
    with pytest.raises(NonFiniteError, match=f'model: "{name}" holds NaN or infinite values; load a sound checkpoint'):
        dfqlib.quantize(teacher, SHAPE, **TINY)


def test_logits_that_are_not_finite_are_refused(teacher: nn.Module) -> None:
    class Endless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    broken = nn.Sequential(copy.deepcopy(teacher), Endless())
    with pytest.raises(NonFiniteError, match="its logits on Gaussian images are NaN or infinite"):
        dfqlib.quantize(broken, SHAPE, **TINY)


@pytest.mark.parametrize("bad", [0, 7, 11])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    bad: int, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_loss, calls = losses.distillation_loss, iter(range(10**6))

    def breaks(*arguments: Any) -> Tensor:
        return true_loss(*arguments) * (torch.nan if next(calls) == bad else 1.0)

    monkeypatch.setattr(losses, "distillation_loss", breaks)
    with pytest.raises(NonFiniteError, match=f'fine-tuning: the loss "loss" became nan at step {bad}; lower'):
        dfqlib.quantize(teacher, SHAPE, **TINY)


def test_a_learning_rate_that_breaks_the_network_is_an_error_not_a_result(teacher: nn.Module) -> None:
    with pytest.raises(InputError, match=r"step of \S+ became|became (nan|inf) at step"):
        dfqlib.quantize(teacher, SHAPE, **{**TINY, "lr": 1e3, "step_lr": 1.0, "steps": 20})
