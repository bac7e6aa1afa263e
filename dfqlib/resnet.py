"""Residual networks of He et al. 2016 for small images: ResNet-20 to 56 for CIFAR, ResNet-8 for digits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.errors import InputError


class PaddedShortcut(nn.Module):
    """Shortcut without parameters where the shape changes: every second pixel, zeros for the new channels.

    Option A of He et al. 2016, section 4.2. Half of the zero channels go before the old ones, half after.
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
        nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False),
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
    """Three stages of basic blocks, each at half the resolution of the one before.

    He et al. 2016, section 4.2.

    Args:
        blocks: blocks in a stage; the depth is ``6 * blocks + 2``.
        widths: channels of the three stages.
        in_channels: channels of the image.
        classes: number of classes.
        downsample: builds the shortcut where a stage changes the shape, from (in, out) channels.
    """

    def __init__(
        self,
        blocks: int,
        widths: tuple[int, int, int],
        in_channels: int,
        classes: int,
        downsample: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        first, second, third = widths

        def stage(before: int, width: int) -> nn.Sequential:
            if before == width:
                head = BasicBlock(width, width, nn.Identity(), stride=1)
            else:
                head = BasicBlock(before, width, downsample(before, width), stride=2)
            tail = (BasicBlock(width, width, nn.Identity(), stride=1) for _ in range(blocks - 1))
            return nn.Sequential(head, *tail)

        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = stage(first, first)
        self.layer2 = stage(first, second)
        self.layer3 = stage(second, third)
        self.linear = nn.Linear(third, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (B, C, H, W) to logits (B, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class CifarResNet(ResNet):
    """ResNet-20, 32, 44 or 56 for 32x32 images, with shortcuts of option A (He et al. 2016, table 6).

    Args:
        depth: 20, 32, 44, 56, or any other ``6 n + 2``.
        classes: number of classes.
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        if depth < 8 or depth % 6 != 2:
            raise InputError(f"depth={depth} is no CIFAR ResNet; take 6 n + 2, for example 20, 32, 44 or 56")
        super().__init__((depth - 2) // 6, (16, 32, 64), 3, classes, PaddedShortcut)


class ResNet8(ResNet):
    """The digits teacher: 16x16 images of one channel, 44,014 parameters, learned shortcuts."""

    def __init__(self) -> None:
        super().__init__(1, (12, 24, 48), 1, 10, projection_shortcut)
