"""VGG of Simonyan and Zisserman 2015 with BatchNorm, for 32x32 images."""

import itertools

import torch
from torch import Tensor, nn

from dfqlib.errors import InputError

_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five groups of 3x3 convolutions with BatchNorm, each followed by max pooling, then linear layers.

    The convolutions are configurations A, B, D and E of the paper's table 1. Its head of 4,096 units is for 224x224
    images. The usual heads for 32x32 are two layers of 512 units with dropout
    (github.com/chengyangfu/pytorch-vgg-cifar10) and none (github.com/kuangliu/pytorch-cifar); weights have the names
    used there. DFQF prints VGG-13/VGG-16 as 65.1 % of the parameters: two hidden layers give 65.17 %, none 63.93 %.
    It prints 73.4 % of the FLOPs: both give 72.9 % of the multiply-accumulates.

    Args:
        depth: 11, 13, 16 or 19 layers, the paper's three linear ones included.
        classes: number of classes.
        hidden: units of the linear layers before the last one; ``()`` for none.
    """

    def __init__(self, depth: int = 16, classes: int = 10, hidden: tuple[int, ...] = (512, 512)) -> None:
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise InputError(f"depth={depth} is no VGG; take {', '.join(map(str, _CONVOLUTIONS))}")
        features: list[nn.Module] = []
        before = 3
        for count, width in zip(_CONVOLUTIONS[depth], _WIDTHS, strict=True):
            for _ in range(count):
                features += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.classifier = _head((before, *hidden), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (B, 3, 32, 32) to logits (B, classes)."""
        return self.classifier(torch.flatten(self.features(x), 1))


def _head(units: tuple[int, ...], classes: int) -> nn.Module:
    last = nn.Linear(units[-1], classes)
    if len(units) == 1:
        return last
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(units):
        layers += [nn.Dropout(), nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, last)
