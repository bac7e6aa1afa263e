"""A classifier that the library does not know: the example of bringing your own network.

Rebuilt from a public CIFAR-100 checkpoint: a ResNet-20 with a wide stem, 1x1 convolutions wherever the shape
changes, and its ReLUs before the stages instead of after the blocks' sums.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.507, 0.487, 0.441)
STD = (0.267, 0.256, 0.276)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)


class Cifar100ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Block(64, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(256, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(F.relu(x))
        return self.linear(torch.flatten(F.avg_pool2d(F.relu(x), 4), 1))
