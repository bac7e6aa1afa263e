"""Wide residual networks of Zagoruyko and Komodakis 2016."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.errors import InputError
from dfqlib.network.convolution import guard


class WideBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, B(3,3) of the paper; no ReLU after the sum.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.projects = in_channels != out_channels
        if self.projects:
            self.shortcut = guard(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/stride, W/stride)."""
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (self.shortcut(activated) if self.projects else x)


class WideResNet(nn.Module):
    """WRN-depth-width for 32x32 images, such as WRN-16-1 and WRN-40-2, students and teachers of AKD.

    Table 1 of Zagoruyko and Komodakis 2016, without dropout.

    Args:
        depth: number of convolutions, ``6 n + 4``; counts those on the shortcuts into the three stages.
        width: factor on the 16, 32 and 64 channels of the three stages.
        classes: number of classes.
    """

    def __init__(self, depth: int = 16, width: int = 1, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise InputError(f"depth={depth} is no wide ResNet; take 6 n + 4, for example 16, 28 or 40")
        if width < 1:
            raise InputError(f"width={width} must be 1 or more")
        blocks: list[nn.Module] = []
        before = 16
        for channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(before, channels, stride if block == 0 else 1))
                before = channels
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.bn1 = nn.BatchNorm2d(before)
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) to logits (B, classes)."""
        x = F.relu(self.bn1(self.blocks(self.conv1(x))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
