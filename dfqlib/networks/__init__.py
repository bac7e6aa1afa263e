"""The networks of the papers for small images, with random weights, and what each of them costs.

>>> network = WideResNet(16, 1)
>>> complexity(network, image_shape=(3, 32, 32))
(175066, 26657408)

``models.build`` makes them by name; ``models.load_model`` knows those that have public weights.

Taught in notebook 05.
"""

from dfqlib.networks.complexity import complexity
from dfqlib.networks.lenet import LeNet5
from dfqlib.networks.mobilenet import MobileNetV2
from dfqlib.networks.resnet import CifarResNet, ResNet, ResNet8, ResNet18, ResNet34
from dfqlib.networks.vgg import VGG
from dfqlib.networks.wide_resnet import WideResNet

__all__ = [
    "VGG", "CifarResNet", "LeNet5", "MobileNetV2", "ResNet", "ResNet8", "ResNet18", "ResNet34", "WideResNet",
    "complexity",
]  # fmt: skip
