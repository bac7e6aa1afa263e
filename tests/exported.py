"""Networks of every operation that has an integer form, and the way from a network to its file's logits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib.deploy.onnx.verify import load
from dfqlib.network._torchvision import import_torchvision
from dfqlib.quantizer import QuantSpec, calibrate, quantize_layers

Shape = tuple[int, int, int]


def odd_batch_norms(model: nn.Module) -> nn.Module:
    """Statistics as training leaves them, with negative gains, a dead channel and one that is almost dead."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            assert module.running_mean is not None
            assert module.running_var is not None
            with torch.no_grad():
                module.weight.copy_(torch.randn(channels) * 0.5 + 0.7)
                module.weight[0], module.weight[-1] = 0.0, 1e-9
                module.bias.copy_(torch.randn(channels) * 0.3)
                module.running_mean.copy_(torch.randn(channels) * 0.2)
                module.running_var.copy_(torch.rand(channels) + 0.5)
    return model.eval()


class Residual(nn.Module):
    """Functional ReLUs, a sum without one, a shortcut of slices and padding, global pooling by mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.other, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.norm2(self.conv(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head((self.other(x.relu()) + x).mean((2, 3)))


class Mobile(nn.Module):
    """ReLU6, depthwise and linear bottleneck, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6())
        self.linear = nn.Sequential(nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.linear(self.depthwise(x)))


class Gated(Mobile):
    """Channels weighted by what the whole image says, as in MobileNetV3 and EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(self.stem(x)))
        return self.head(F.hardsigmoid(self.gate(x)) * x)


class Branches(nn.Module):
    """Pre-activation, concatenation, two poolings, a smooth activation, a grouped and dilated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)
        self.conv, self.mix = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), nn.Conv2d(16, 8, 1)
        self.hidden, self.head = nn.Linear(8 * 4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(F.silu(self.norm(x)))
        x = F.max_pool2d(self.mix(torch.cat([x, y.relu()], 1)), 3, 2, 1)
        x = F.avg_pool2d(x, 3, 2, 1)
        return self.head(F.leaky_relu(self.hidden(x.view(x.size(0), -1)), 0.1))


class WholeConv(nn.Module):
    """No linear layer: the logits are an average."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1)


class Arithmetic(Mobile):
    """A hard swish written out, and numbers on either side of an operator."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * F.relu6(x + 3) / 6
        return self.head(1 - 0.5 * self.linear(-x))


NETWORKS: dict[str, tuple[type[nn.Module], Shape]] = {
    "residual": (Residual, (3, 8, 8)),
    "gated": (Gated, (3, 8, 8)),
    "branches": (Branches, (3, 8, 8)),
    "whole_conv": (WholeConv, (3, 6, 6)),
    "arithmetic": (Arithmetic, (3, 8, 8)),
}


def from_torchvision(name: str) -> tuple[nn.Module, Shape]:
    """A network of torchvision with random weights and the statistics that belong to them, and images' shape."""
    model, shape = getattr(import_torchvision().models, name)(num_classes=10), (3, 64, 64)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the statistics of all that came in, which keep random weights from fading
    model.train()(torch.randn(8, *shape))
    return model.eval(), shape


def quantized(model: nn.Module, shape: Shape, bits: str = "w4a4", **options: Any) -> nn.Module:
    network = quantize_layers(model, QuantSpec.parse(bits, **options))
    calibrate(network, torch.randn(32, *shape), "max")
    return network


def logits_of_file(path: Path, images: Tensor) -> tuple[Tensor, dict[str, int]]:
    session, operations = load(path)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), operations
