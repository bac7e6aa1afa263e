"""A quantized network comes back from its file bit for bit, and no other file is taken for one."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import dfqlib
from dfqlib.deploy.saving import load_quantized, save_quantized
from dfqlib.errors import InputError, NonFiniteError
from dfqlib.models.resnet import ResNet8
from dfqlib.network import graph
from dfqlib.quantizer import QuantSpec, StepQuantizer, calibrate, quantize_layers, quantizers
from dfqlib.training import channels_last

SHAPE = (1, 16, 16)


def images(count: int = 16) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def residual() -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.f = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.f(self.c(self.b(x) + x).mean((2, 3)))

    torch.manual_seed(0)
    return Residual().eval()


def calibrated(model: nn.Module, spec: QuantSpec | None = None) -> nn.Module:
    network = channels_last(quantize_layers(model, spec or QuantSpec()))
    calibrate(network, images())
    return network


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    equal = all(torch.equal(ours[k], v) and ours[k].stride() == v.stride() for k, v in theirs.items())
    return ours.keys() == theirs.keys() and equal and torch.equal(first(images()), second(images()))


@pytest.fixture(scope="module")
def report() -> Any:
    torch.set_num_threads(1)
    teacher = dfqlib.load_model("digits_resnet8")
    return dfqlib.quantize(teacher, SHAPE, "w3a4", progress=False, images=8, synthesis_steps=2, steps=2, batch=4)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_quantized(calibrated(small()), tmp_path / "q.pt")


def test_a_known_architecture_loads_from_the_file_alone(report: Any, tmp_path: Path) -> None:
    path = save_quantized(report, tmp_path / "q.pt", arch="digits_resnet8")
    network = load_quantized(path)
    assert same_bits(network, report.model)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert network.meta["spec"] == QuantSpec.parse("w3a4")
    known, kept = dfqlib.models.info("digits_resnet8"), network.meta["saved"]
    assert (tuple(kept["mean"]), tuple(kept["std"]), tuple(kept["classes"])) == (known.mean, known.std, known.classes)
    settings = {name: value for name, value in report.settings.items() if name != "spec"}
    assert kept["settings"].items() >= settings.items()
    assert QuantSpec(**kept["settings"]["spec"]) == report.settings["spec"]
    again = load_quantized(save_quantized(network, tmp_path / "again.pt"), ResNet8())
    assert same_bits(again, report.model)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("step", ["learned", "fixed"])
def test_every_kind_of_quantizer_round_trips(scheme: Any, granularity: Any, step: Any, tmp_path: Path) -> None:
    spec = QuantSpec(3, 5, 6, granularity=granularity, scheme=scheme, step=step, skip="float")
    network = calibrated(ResNet8(), spec)
    model = ResNet8()
    before = copy.deepcopy(model.state_dict())
    loaded = load_quantized(save_quantized(network, tmp_path / "q.pt"), model)
    assert same_bits(loaded, network)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_signs_that_calibration_found_are_kept(tmp_path: Path) -> None:
    model = residual()
    network = quantize_layers(model, QuantSpec())
    for name, quantizer in quantizers(network):
        if isinstance(quantizer, StepQuantizer) and not name.endswith("weight_quantizer"):
            quantizer.set_sign(False)  # as if the structure promised that no tensor is ever negative
    calibrate(network, images())
    assert dict(quantizers(network))["quantize_x"].signed  # type: ignore[union-attr]
    loaded = load_quantized(save_quantized(network, tmp_path / "q.pt"), model)
    assert same_bits(loaded, network)
    for (name, ours), (_, theirs) in zip(quantizers(network), quantizers(loaded), strict=True):
        assert (ours.signed, ours.qmin, ours.qmax) == (theirs.signed, theirs.qmin, theirs.qmax), name  # type: ignore[union-attr]


def test_so_are_those_of_the_sums_that_only_an_exported_file_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = residual()
    monkeypatch.setattr(graph, "non_negative", lambda nodes: set(nodes.nodes))
    report = dfqlib.quantize(model, SHAPE, recipe="equalize", progress=False)
    at_once = report.export(tmp_path / "a.onnx").read_bytes()
    network = load_quantized(report.save(tmp_path / "q.pt"), model)
    assert dfqlib.export_onnx(network, tmp_path / "b.onnx").read_bytes() == at_once
    again = load_quantized(save_quantized(network, tmp_path / "q2.pt"), model)
    assert dfqlib.export_onnx(again, tmp_path / "c.onnx").read_bytes() == at_once
    check = dfqlib.verify_export(report, tmp_path / "a.onnx", images())
    assert check.largest_difference == 0
    assert check.simulation_agreement > 90


def test_biases_that_a_recipe_gave_to_layers_called_as_functions_are_kept(tmp_path: Path) -> None:
    model, shape = zoo.make("layers_used_for_their_weights_alone")
    report = dfqlib.quantize(model, shape, recipe="equalize", progress=False)
    loaded = load_quantized(report.save(tmp_path / "q.pt"), model)
    inputs = torch.randn(4, *shape)
    assert torch.equal(loaded(inputs), report.model(inputs))


def test_the_file_holds_nothing_but_tensors_and_plain_values(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert content["arch"] is None
    assert QuantSpec(**content["spec"]) == QuantSpec()


def test_a_file_that_was_there_is_replaced_whole_or_not_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full_disk(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_quantized(calibrated(small()), saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["q.pt"]


def test_only_a_calibrated_quantized_network_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "q.pt"
    for network, message in (
        (small(), "network=Sequential has no quantizers; give what dfqlib.quantize returned"),
        (quantize_layers(small(), QuantSpec()), "network is not calibrated; call"),
    ):
        with pytest.raises(InputError, match=message):
            save_quantized(network, path)
    for arch, message in (("resnet1000", "known are digits_resnet8"), ("digits_resnet8", "network does not fit arch=")):
        with pytest.raises(InputError, match=message):
            save_quantized(calibrated(small()), path, arch=arch)
    with pytest.raises(InputError, match="is a folder"):
        save_quantized(calibrated(small()), tmp_path)
    assert not path.exists()


def refusal(path: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_quantized(path, model)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def test_an_architecture_of_ones_own_needs_the_model(saved: Path) -> None:
    assert "pass model=" in refusal(saved)
    assert "does not fit ResNet8: missing" in refusal(saved, ResNet8())


def test_files_that_are_something_else_are_named(saved: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.pt")
    plain = tmp_path / "plain.pt"
    torch.save(small().state_dict(), plain)
    assert "no quantized network; give a file that dfqlib.save_quantized wrote" in refusal(plain, small())
    torch.save(small(), plain)
    assert "nothing in it was run" in refusal(plain, small())
    plain.write_bytes(saved.read_bytes()[:-200])
    assert "save it again with dfqlib.save_quantized(report, path)" in refusal(plain, small())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=99), "version 99 of the format.*update dfqlib"),
        (lambda c: c.pop("state_dict"), "is damaged"),
        (lambda c: c.pop("arch"), "is damaged"),
        (lambda c: c["spec"].update(weight_bits=1), "is damaged .*weight_bits=1"),
        (lambda c: c["spec"].update(rounding="up"), "is damaged"),
        (lambda c: c["state_dict"].pop("5.weight_quantizer.step"), "missing 5.weight_quantizer.step"),
    ],
)
def test_a_damaged_file_is_named(saved: Path, change: Callable[[Any], Any], message: str) -> None:
    assert re.search(message, refusal(rewritten(saved, change), small()))


def test_a_weight_that_is_not_finite_is_named(saved: Path) -> None:
    rewritten(saved, lambda content: content["state_dict"]["0.weight"].view(-1)[:1].fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=r"0\.weight has NaN"):
        load_quantized(saved, small())


def test_a_report_gives_the_same_exported_file_before_and_after_it_was_saved(report: Any, tmp_path: Path) -> None:
    at_once = report.export(tmp_path / "a.onnx").read_bytes()
    network = load_quantized(report.save(tmp_path / "q.pt", arch="digits_resnet8"))
    assert dfqlib.export_onnx(network, tmp_path / "b.onnx").read_bytes() == at_once
    again = load_quantized(save_quantized(network, tmp_path / "q2.pt", arch="digits_resnet8"))
    assert dfqlib.export_onnx(again, tmp_path / "c.onnx").read_bytes() == at_once


def test_a_report_prints_as_a_line_and_summarizes_on_a_screen(report: Any) -> None:
    assert "\n" not in repr(report)
    assert len(repr(report)) < 250
    summary = report.summary()
    assert "W3A4" in summary
    assert "layer1.0.conv1 3" in summary
    assert "100.0 % of" in summary
    assert len(summary.splitlines()) < 25
    comparison = report.compare(dfqlib.load_data("digits"))
    assert comparison.teacher_top1 == 100
