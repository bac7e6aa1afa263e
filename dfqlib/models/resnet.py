"""Residual networks of He et al. 2016 for small images.

ResNet-20 to 56 are the paper's networks for CIFAR (section 4.2). ResNet-18 and 34 are its networks for ImageNet
(table 1) with the stem that is usual on CIFAR. ResNet-8 classifies the digits.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.errors import InputError
from dfqlib.network.convolution import guard


class PaddedShortcut(nn.Module):
    """Shortcut without parameters where the shape changes (option A of He et al. 2016, section 4.2).

    Keeps every second pixel, and adds half of the new, zero channels before the old ones and half after them.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/2, W/2)."""
        return F.pad(x[:, :, ::2, ::2], self.padding)


def projection_shortcut(in_channels: int, out_channels: int) -> nn.Module:
    """Learned shortcut where the shape changes: 1x1 convolution with stride 2 and BN (option B)."""
    return nn.Sequential(
        guard(nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN, plus the shortcut, then ReLU."""

    def __init__(self, in_channels: int, out_channels: int, shortcut: nn.Module, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/stride, W/stride)."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of basic blocks, each at half the resolution of the one before (He et al. 2016).

    Args:
        blocks: blocks in each stage.
        widths: channels of each stage.
        in_channels: channels of an image.
        classes: number of classes.
        downsample: builds the shortcut where a stage changes the shape, from (in, out) channels.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        in_channels: int,
        classes: int,
        downsample: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        before = widths[0]
        self.conv1 = nn.Conv2d(in_channels, before, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.stages = [f"layer{number}" for number in range(1, len(widths) + 1)]  # names as in public checkpoints
        for name, count, width in zip(self.stages, blocks, widths, strict=True):
            self.add_module(name, _stage(count, before, width, downsample))
            before = width
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (B, C, H, W) to logits (B, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _stage(count: int, before: int, width: int, downsample: Callable[[int, int], nn.Module]) -> nn.Sequential:
    if before == width:
        head = BasicBlock(width, width, nn.Identity(), stride=1)
    else:
        head = BasicBlock(before, width, downsample(before, width), stride=2)
    tail = (BasicBlock(width, width, nn.Identity(), stride=1) for _ in range(count - 1))
    return nn.Sequential(head, *tail)


class CifarResNet(ResNet):
    """ResNet-20, 32, 44 or 56 for 32x32 images, with shortcuts of option A (He et al. 2016, table 6).

    Args:
        depth: 20, 32, 44, 56, or any other ``6 n + 2``.
        classes: number of classes.
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        if depth < 8 or depth % 6 != 2:
            raise InputError(f"depth={depth} is no CIFAR ResNet; take 6 n + 2, for example 20, 32, 44 or 56")
        super().__init__([(depth - 2) // 6] * 3, (16, 32, 64), 3, classes, PaddedShortcut)


class ResNet18(ResNet):
    """ResNet-18 for 32x32 images: 11,173,962 parameters for 10 classes.

    Table 1 of He et al. 2016 with a 3x3 stem of stride 1, no pooling after it, and learned shortcuts (option B). Layers
    and names are those of github.com/kuangliu/pytorch-cifar, the student of DAFL and DFQF.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__((2, 2, 2, 2), (64, 128, 256, 512), 3, classes, projection_shortcut)


class ResNet34(ResNet):
    """ResNet-34 for 32x32 images: 21,282,122 parameters for 10 classes; everything else as in ``ResNet18``.

    ResNet-18 has 52.5 % of its parameters and 47.9 % of its multiply-accumulates. DFQF prints 52.4 %, the ratio of
    11.1 to 21.2 million, and 46.9 %, which no count of these layers gives.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__((3, 4, 6, 3), (64, 128, 256, 512), 3, classes, projection_shortcut)


class ResNet8(ResNet):
    """The teacher on the digits: 16x16 images of one channel, 44,014 parameters, learned shortcuts."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1), (12, 24, 48), 1, 10, projection_shortcut)
