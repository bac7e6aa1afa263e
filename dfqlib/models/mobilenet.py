"""MobileNetV2 of Sandler et al. 2018 for 32x32 images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Table 2 of the paper: expansion, channels, blocks, stride of the first one; at 24 channels the stride is 1, not 2."""


class InvertedResidual(nn.Module):
    """A 1x1 convolution that expands, a depthwise one, and a 1x1 projection (Sandler et al. 2018, section 3.3).

    ReLU6 follows the first two. The projection is linear, so the block's output can be negative.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        inside = expansion * in_channels
        expand = [] if expansion == 1 else _convolution(in_channels, inside, 1)
        filtering = _convolution(inside, inside, 3, stride, groups=inside)
        project = (nn.Conv2d(inside, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.layers = nn.Sequential(*expand, *filtering, *project)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/stride, W/stride)."""
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 for 32x32 images: 2,236,682 parameters for 10 classes, 3,504,872 for 1,000.

    The paper's network, with stride 1 instead of 2 in the stem and at 24 channels, so that the last map is 4x4. The
    strides are those of github.com/kuangliu/pytorch-cifar, whose blocks differ from the paper's: they have ReLU, and a
    1x1 convolution as shortcut where the channels change.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers = _convolution(3, 32, 3)
        before = 32
        for expansion, width, count, stride in _STAGES:
            for block in range(count):
                layers.append(InvertedResidual(before, width, expansion, stride if block == 0 else 1))
                before = width
        self.features = nn.Sequential(*layers, *_convolution(before, 1280, 1))
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) to logits (B, classes)."""
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))


def _convolution(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU6()]
