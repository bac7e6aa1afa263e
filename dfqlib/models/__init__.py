"""Networks by name with trained weights, the architectures of the papers, and their cost.

>>> teacher = load_model("digits_resnet8")                      # bundled
>>> teacher = load_model("cifar10_resnet20")                    # downloaded once, hash checked
>>> teacher = load_model("cifar10_resnet20", checkpoint=path)   # a file you have
>>> student = build("wrn_16_1", classes=100)                    # random weights
>>> complexity(student, image_shape=(3, 32, 32))                # weights, multiply-accumulates

For a network of your own, build it and call :func:`load_checkpoint`.

Taught in notebooks 05 and 11.
"""

from dfqlib.models.checkpoints import load_checkpoint
from dfqlib.models.complexity import complexity
from dfqlib.models.lenet import LeNet5
from dfqlib.models.mobilenet import MobileNetV2
from dfqlib.models.registry import ModelInfo, architectures, build, info, load_model, names
from dfqlib.models.resnet import CifarResNet, ResNet, ResNet8, ResNet18, ResNet34
from dfqlib.models.vgg import VGG
from dfqlib.models.wide_resnet import WideResNet

__all__ = [
    "VGG", "CifarResNet", "LeNet5", "MobileNetV2", "ModelInfo", "ResNet", "ResNet8", "ResNet18", "ResNet34",
    "WideResNet", "architectures", "build", "complexity", "info", "load_checkpoint", "load_model", "names",
]  # fmt: skip
