"""LeNet-5 of LeCun et al. 1998, in the variants of data-free distillation on MNIST."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.errors import InputError


class LeNet5(nn.Module):
    """Three convolutions and two linear layers: 44,568 parameters, or 11,489 with half the channels.

    Channels, ReLU, max pooling and the names of the weights are those of DAFL (Chen et al. 2019), whose network has no
    BatchNorm and takes MNIST enlarged to 32x32: ``LeNet5(image_size=32, batchnorm=False)`` loads its checkpoints. The
    default has BatchNorm, for methods that match its statistics, and takes MNIST's 28x28. It reproduces DFQF's ratios
    of half to whole: 25.8 % of the parameters, and 33.0 % of the FLOPs with one operation per output of BatchNorm.

    Args:
        classes: number of classes.
        half: half of the channels in each layer, the student of DAFL and DFQF.
        image_size: height and width of the one-channel images, 28 or 32.
        batchnorm: BatchNorm after each convolution, which then has no bias.
    """

    def __init__(self, classes: int = 10, *, half: bool = False, image_size: int = 28, batchnorm: bool = True) -> None:
        super().__init__()
        if image_size not in (28, 32):
            raise InputError(f"image_size={image_size} is not LeNet-5's; take 28, or 32 for enlarged images")
        widths = (3, 8, 60, 42) if half else (6, 16, 120, 84)
        first, second, third, hidden = widths
        last_map = ((image_size - 4) // 2 - 4) // 2  # the third convolution covers the whole map
        self.conv1, self.bn1 = _convolution(1, first, 5, batchnorm)
        self.conv2, self.bn2 = _convolution(first, second, 5, batchnorm)
        self.conv3, self.bn3 = _convolution(second, third, last_map, batchnorm)
        self.fc1 = nn.Linear(third, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (B, 1, H, W) to logits (B, classes)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def _convolution(in_channels: int, out_channels: int, kernel: int, batchnorm: bool) -> tuple[nn.Conv2d, nn.Module]:
    after = nn.BatchNorm2d(out_channels) if batchnorm else nn.Identity()
    return nn.Conv2d(in_channels, out_channels, kernel, bias=not batchnorm), after
