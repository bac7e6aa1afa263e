"""Facts about the faster form of a network for training: the same values, the same gradients, fewer passes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dfqlib
from dfqlib import batchnorm, quantizer
from dfqlib.quantizer import QuantSpec, fused, quantize_layers


class Net(nn.Module):
    """A convolution with a bias, a strided 1x1 one, a ReLU read twice, BatchNorm on vectors and without a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.short = nn.Conv2d(8, 8, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.hidden, self.bn1 = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = torch.relu(self.norm(self.short(x)) + F.max_pool2d(x, 2)).mean((2, 3))
        return self.last(F.relu(self.bn1(self.hidden(x))))


def teacher() -> Net:
    network = Net().train()
    for _ in range(20):
        network(torch.randn(64, 3, 8, 8))
    return network.eval().requires_grad_(False)


def gradients(network: nn.Module, images: Tensor, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    logits = network(images)
    return logits.detach(), list(torch.autograd.grad(logits.square().sum(), parameters))


def same_to_rounding(model: nn.Module, spec: QuantSpec, images: torch.Tensor) -> None:
    student = quantize_layers(model, spec).double().requires_grad_(True)
    quantizer.calibrate(student, images)
    parameters = [p for p in student.parameters() if p.requires_grad]
    (plain, expected), (ours, found) = (gradients(n, images, parameters) for n in (student, fused(student)))
    torch.testing.assert_close(ours, plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


SPECS: list[dict[str, Any]] = [{}, {"granularity": "channel", "edge_bits": 4}, {"skip": "float"}, {"scheme": "affine"}]


@pytest.mark.parametrize("spec", SPECS, ids=["tensor", "channel", "float skip", "affine"])
@pytest.mark.parametrize("name", ["net", "digits"])
def test_values_and_gradients_are_the_same_to_rounding(name: str, spec: dict[str, Any]) -> None:
    model, shape = (teacher(), (3, 8, 8)) if name == "net" else (dfqlib.load_model("digits_resnet8"), (1, 16, 16))
    images = torch.randn(16, *shape).double()  # so that sums which nearly cancel can be compared, too
    same_to_rounding(model, QuantSpec.parse("w4a4", **spec), images)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_dead_channels_are_the_same_too(granularity: Any) -> None:
    """Channels without a gain, without weights, without variance, and below zero whatever the image."""
    model = teacher()
    model.bn.weight.data[0], model.bn.bias.data[0] = 0.0, 0.3
    model.bn.bias.data[1] = model.bn1.bias.data[1] = -100.0
    model.conv.weight.data[2] = 0.0
    model.bn.running_var[3] = 0.0
    images = torch.randn(16, 3, 8, 8).double()
    same_to_rounding(model, QuantSpec(4, 4, granularity=granularity), images)


def test_a_channel_that_is_zero_whatever_the_image_can_learn_again() -> None:
    model = teacher()
    model.bn.weight.data[0] = model.bn.bias.data[0] = 0.0
    images = torch.randn(16, 3, 8, 8).double()
    student = quantize_layers(model, QuantSpec()).double().requires_grad_(True)
    quantizer.calibrate(student, images)
    bias = student.get_parameter("bn.bias")
    (plain, (dead,)), (ours, (alive,)) = (gradients(n, images, [bias]) for n in (student, fused(student)))
    torch.testing.assert_close(ours, plain)
    assert dead[0] == 0 != alive[0]
    torch.testing.assert_close(alive[1:], dead[1:])


def test_no_batchnorm_is_left_and_only_relus_that_something_else_reads() -> None:
    student = quantize_layers(teacher(), QuantSpec())
    quantizer.calibrate(student, torch.randn(8, 3, 8, 8))
    kinds = [str(node.target) for node in fused(student).graph.nodes]
    assert not any(name in ("bn", "norm", "bn1") for name in kinds)
    assert sum("relu" in name and not name.startswith("quantize") for name in kinds) == 1  # pooled before a quantizer
    assert "bn" in {str(node.target) for node in student.graph.nodes}  # the student itself stays as it was


def test_training_one_trains_the_other() -> None:
    student = quantize_layers(teacher(), QuantSpec()).requires_grad_(True)
    images = torch.randn(8, 3, 8, 8)
    quantizer.calibrate(student, images)
    faster = fused(student)
    before = student(images)
    descent = torch.optim.SGD(student.parameters(), 0.01)
    faster(images).square().sum().backward()
    descent.step()
    assert not torch.equal(student(images), before)
    torch.testing.assert_close(student(images), faster(images))


def test_batchnorm_in_training_mode_stays() -> None:
    student = quantize_layers(teacher(), QuantSpec()).train()
    quantizer.calibrate(student, torch.randn(8, 3, 8, 8))
    assert batchnorm.layers(fused(student)).keys() == {"bn", "norm", "bn1"}


def test_of_a_network_that_is_no_graph_a_copy_is_made() -> None:
    model, images = teacher(), torch.randn(8, 3, 8, 8)
    faster = fused(model)
    assert not batchnorm.layers(faster).keys() & {"bn"}
    torch.testing.assert_close(faster(images), model(images))
    assert {id(p) for p in faster.parameters()}.isdisjoint({id(p) for p in model.parameters()})
