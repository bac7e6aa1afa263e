"""Facts about the compiled network: the same numbers as the plain one, and no harm where nothing can compile."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import dfqlib
from dfqlib.quantizer import QuantSpec, calibrate, compiled, fused, quantize_layers
from dfqlib.training import channels_last, mixed_precision

DIGITS = (1, 16, 16)


def student(images: Tensor, **spec: Any) -> fx.GraphModule:
    network = quantize_layers(dfqlib.load_model("digits_resnet8"), QuantSpec.parse("w4a4", **spec))
    network = network.to(images.dtype).requires_grad_(True)
    calibrate(network, images)
    return network


def compiled_or_skip(network: nn.Module, images: Tensor) -> nn.Module:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = compiled(network, images)
    if made is network:
        pytest.skip(f"PyTorch finds no working C++ compiler here: {caught[-1].message}")
    return made


def gradients(network: nn.Module, images: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    logits = network(images)
    found = torch.autograd.grad(logits.float().square().sum(), parameters)
    return logits.detach(), torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("spec", [{}, {"granularity": "channel", "edge_bits": 4}], ids=["tensor", "channel"])
def test_values_and_gradients_are_the_same_to_rounding(spec: dict[str, Any]) -> None:
    images = torch.randn(8, *DIGITS).double()  # so that sums which nearly cancel can be compared, too
    plain = fused(student(images, **spec))
    parameters = [p for p in plain.parameters() if p.requires_grad]
    made = compiled_or_skip(plain, images)
    (ours, found), (logits, expected) = (gradients(each, images, parameters) for each in (made, plain))
    torch.testing.assert_close(ours, logits)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_bfloat16_strays_no_further_than_in_the_plain_network() -> None:
    images = torch.randn(64, *DIGITS).contiguous(memory_format=torch.channels_last)
    plain = fused(channels_last(student(images)))
    parameters = [p for p in plain.parameters() if p.requires_grad]
    _, exact = gradients(plain, images, parameters)
    cpu = torch.device("cpu")
    with mixed_precision(cpu):
        made = compiled_or_skip(plain, images)
        (_, ours), (_, theirs) = (gradients(each, images, parameters) for each in (made, plain))
    similarity = [torch.cosine_similarity(each, exact, dim=0).item() for each in (ours, theirs)]
    assert similarity[0] > similarity[1] - 0.02


def test_express_learns_the_same_with_it() -> None:
    teacher = dfqlib.load_model("digits_resnet8")
    short = {"images": 16, "synthesis_steps": 2, "steps": 6, "bf16": False}
    runs = [dfqlib.quantize(teacher, DIGITS, "w3a3", progress=False, compiled=c, **short) for c in (True, False)]
    ours, plain = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_shifted_and_mirrored_batches_are_not_compiled_anew() -> None:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    teacher = nn.Sequential(*layers, nn.Linear(8, 4))
    before = counters["stats"]["unique_graphs"]
    dfqlib.quantize(teacher, (3, 8, 8), images=16, synthesis_steps=2, steps=12, progress=False, compiled=True)
    assert counters["stats"]["unique_graphs"] - before <= 1  # none without a compiler


def test_without_a_compiler_it_warns_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    images = torch.randn(8, *DIGITS)
    network = fused(student(images))
    with pytest.warns(UserWarning, match="install a C\\+\\+ compiler"):
        assert compiled(network, images) is network
