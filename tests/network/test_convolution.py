"""Strided 1×1 convolutions: the same values, and neither a crash nor a wrong gradient on any processor."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from claims import PROCESSORS
from torch import nn
from torch.nn import functional as F

import dfqlib
from dfqlib.models import ResNet8
from dfqlib.network import convolution, graph
from dfqlib.quantizer import QuantConv2d, QuantSpec, quantize_layers
from dfqlib.training import channels_last

CASES = Path(__file__).parent.with_name("convolution_cases.py")
RUNS = {
    "quantize": 'dfqlib.quantize(model, (1, 16, 16), images=9, synthesis_steps=1, steps=3, batch=9, progress=False)',
    "distill": 'dfqlib.distill(model, dfqlib.models.ResNet8(), (1, 16, 16), distill_epochs=1, iterations=3, batch=9, '
    "progress=False)",
}  # fmt: skip


def run(
    arguments: list[str], threads: int, processor: str, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Python as on another processor, for at most ``timeout`` seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **PROCESSORS[processor]}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)


class Scaled(nn.Conv2d):
    """A subclass that computes what its base does."""


class Standardized(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias, self.stride)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [2, (1, 3)])
@pytest.mark.parametrize("kind", [nn.Conv2d, Scaled])
def test_leaving_pixels_out_first_computes_the_same(kind: Any, groups: int, stride: int | tuple[int, int]) -> None:
    model = nn.Sequential(kind(4, 6, 1, stride, groups=groups), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 2, 3, 2))
    x = torch.randn(2, 4, 7, 8)
    before, names, original = model(x), list(model.state_dict()), copy.deepcopy(model)
    changed = channels_last(model)
    assert isinstance(changed[0], convolution.Unstrided) is convolution.FAULTY
    assert isinstance(changed[0], kind)
    assert all(type(layer) is nn.Conv2d for layer in changed[1:])
    assert convolution.kind_of(changed[0]) is nn.Conv2d  # a subclass that adds nothing is its base
    assert list(changed.state_dict()) == names
    torch.testing.assert_close(changed(x), before)
    restored = convolution.restore(changed, original)
    assert [type(layer) for layer in restored] == [kind, nn.Conv2d, nn.Conv2d]
    assert restored[0].weight.is_contiguous()


def test_layers_that_the_fault_spares_stay_as_they_are() -> None:
    spared = [{"padding": 1}, {"kernel_size": 3}, {"stride": 1}, {"kernel_size": (1, 2)}]
    for options in spared:
        layer = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 1, "stride": 2, **options})
        assert type(convolution.guard(layer)) is nn.Conv2d


def test_inside_guarded_every_call_computes_the_same() -> None:
    x, weight, bias = torch.randn(2, 4, 7, 8), torch.randn(6, 4, 1, 1), torch.randn(6)
    for stride in (2, (1, 3), [2]):
        for padding in (0, (0, 0), "valid", 1):
            expected = F.conv2d(x, weight, bias, stride, padding)
            with convolution.guarded():
                torch.testing.assert_close(F.conv2d(x, weight, bias, stride, padding), expected)
                torch.testing.assert_close(F.conv2d(x, weight, bias=bias, stride=stride, padding=padding), expected)


def test_a_guarded_network_is_traced_and_quantized_as_a_plain_one() -> None:
    plain, guarded = ResNet8().eval(), channels_last(ResNet8().eval())
    for layer in plain.modules():
        layer.__class__ = convolution.kind_of(layer)
    networks = [graph.trace(each)[0] for each in (plain, guarded)]
    operations = [[graph.operation(node) for node in network.graph.nodes] for network in networks]
    assert operations[0] == operations[1]
    students = [quantize_layers(each, QuantSpec()) for each in (plain, guarded)]
    kinds = [[type(layer) for layer in student.modules() if isinstance(layer, nn.Conv2d)] for student in students]
    assert kinds[0] == kinds[1] == [QuantConv2d] * 9
    assert students[1].meta["unquantized"] == []


def test_a_distilled_student_leaves_with_the_classes_and_the_layout_it_came_with() -> None:
    student = nn.Sequential(nn.Conv2d(1, 6, 1, 2), nn.BatchNorm2d(6), nn.ReLU(), Scaled(6, 8, 1, 2), nn.BatchNorm2d(8))
    student.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)])
    teacher = dfqlib.load_model("digits_resnet8")
    options: dict[str, Any] = {"distill_epochs": 1, "iterations": 2, "batch": 8, "progress": False}
    report = dfqlib.distill(teacher, student, (1, 16, 16), recipe="dfqf", **options)
    assert [type(layer) for layer in report.model] == [type(layer) for layer in student]  # type: ignore[arg-type]
    assert report.model[0].weight.is_contiguous()  # type: ignore[index]
    ours = dfqlib.distill(teacher, ResNet8(), (1, 16, 16), recipe="dfqf", **options).model
    assert any(isinstance(layer, convolution.Unstrided) for layer in ours.modules()) is convolution.FAULTY


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("threads", [1, 2])
def test_no_width_batch_or_way_of_training_dies_or_gets_a_wrong_gradient(processor: str, threads: int) -> None:
    done = run([str(CASES), "guarded"], threads, processor)
    assert done.returncode == 0, f"after {(done.stdout.splitlines() or ['nothing'])[-1]}: {done.stderr[-300:]}"
    assert done.stdout.splitlines()[-1] == "256 cases"


@pytest.mark.skipif(not convolution.FAULTY, reason="this torch has no oneDNN with the fault")
def test_the_guard_is_still_needed() -> None:
    """Where this fails, torch ships a oneDNN without the fault: set ``convolution.FIXED_IN`` to its version."""
    assert any(dies(threads) for threads in (1, 2)), f"oneDNN {convolution.onednn_version()} has the fault mended"


def dies(threads: int) -> bool:
    """Whether the cases without the guard fail; a process whose heap is damaged may also run forever."""
    try:
        return run([str(CASES), "unguarded"], threads, "AVX2", timeout=60).returncode != 0
    except subprocess.TimeoutExpired:
        return True


@pytest.mark.parametrize(
    ("configuration", "version"), [("- Intel(R) MKL-DNN v3.12.0 (Git Hash 80af)", (3, 12, 0)), ("USE_MKLDNN=OFF", ())]
)
def test_the_version_of_onednn_is_read(configuration: str, version: tuple[int, ...]) -> None:
    assert convolution.onednn_version(configuration) == version


@pytest.mark.parametrize("verb", RUNS)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_two_threads_train_on_an_odd_batch(verb: str, processor: str) -> None:
    code = f'import dfqlib; model = dfqlib.load_model("digits_resnet8"); {RUNS[verb]}'
    done = run(["-c", code], 2, processor)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_user_s_student_with_functional_convolutions_is_guarded_too() -> None:
    code = "\n".join(
        [
            "import dfqlib, torch; from torch import nn; from torch.nn import functional as F",
            "class Net(nn.Module):",
            "    def __init__(self):",
            "        super().__init__(); self.w = nn.Parameter(torch.randn(12, 6, 1, 1)); self.a = nn.Conv2d(1, 6, 3)",
            "        self.n, self.h = nn.BatchNorm2d(12), nn.Linear(12, 10)",
            "    def forward(self, x):",
            "        return self.h(F.relu(self.n(F.conv2d(self.a(x), self.w, stride=2))).mean((2, 3)))",
            'model = dfqlib.load_model("digits_resnet8")',
            "options = dict(distill_epochs=1, iterations=3, batch=9, progress=False)",
            'print(len(dfqlib.distill(model, Net(), (1, 16, 16), recipe="dfqf", **options).history))',
        ]
    )
    for threads in (1, 2):
        done = run(["-c", code], threads, "AVX2")
        assert done.returncode == 0, done.stderr[-500:]


def test_torch_s_own_tracer_follows_a_guarded_network() -> None:
    model, images = ResNet8().eval(), torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))
