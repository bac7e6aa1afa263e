"""What is measured: networks with their test images, bit widths and protocols."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT

import dfqlib
from dfqlib import QuantSpec

REAL_IMAGES = 1024
"""How many training images the recipe "real" gets; all are seen several times in its iterations."""

PER_TENSOR = "per tensor, first and last at 8 bits"
PER_CHANNEL = "per channel, first and last at 8 bits"
ALL_LAYERS = "per channel, all layers"


@dataclass(frozen=True)
class Case:
    """A network, the bit width of weights and activations, and the protocol."""

    network: str
    bits: int
    protocol: str = PER_TENSOR

    @property
    def spec(self) -> QuantSpec:
        """How the network is quantized."""
        edge_bits = self.bits if self.protocol == ALL_LAYERS else 8
        granularity = "tensor" if self.protocol == PER_TENSOR else "channel"
        return QuantSpec(self.bits, self.bits, edge_bits, granularity)


CASES = {
    "digits_w2a2": Case("digits_resnet8", 2),
    "digits_w3a3": Case("digits_resnet8", 3),
    "cifar10_w4a4": Case("cifar10_resnet20", 4),
    "cifar10_w3a3": Case("cifar10_resnet20", 3),
    "cifar10_w2a2": Case("cifar10_resnet20", 2),
    "cifar10_w4a4_channel": Case("cifar10_resnet20", 4, PER_CHANNEL),
    "cifar10_w3a3_channel": Case("cifar10_resnet20", 3, PER_CHANNEL),
    "cifar10_w4a4_all": Case("cifar10_resnet20", 4, ALL_LAYERS),
    "cifar10_w3a3_all": Case("cifar10_resnet20", 3, ALL_LAYERS),
    "cifar100_w4a4": Case("cifar100_resnet20", 4),
    "cifar100_w4a4_all": Case("cifar100_resnet20", 4, ALL_LAYERS),
    "cifar10_resnet56_w4a4": Case("cifar10_resnet56", 4),
    "cifar10_resnet56_w4a4_all": Case("cifar10_resnet56", 4, ALL_LAYERS),
}
"""On CIFAR-100 and ResNet-56 nothing is tuned: what was chosen on ResNet-20 is confirmed there."""

CHECKPOINTS = {
    "cifar10_resnet20": "resnet20-12fca82f.th",
    "cifar10_resnet56": "resnet56-4bfd9763.th",
    "cifar100_resnet20": "resnet20_cifar100.pth",
}


def missing(network: str, data: Path, images: str = "test") -> str:
    """What this network needs and ``data`` does not have, in words; nothing where all is there."""
    if network not in CHECKPOINTS:
        return ""
    needed = [data / "models" / CHECKPOINTS[network], data / network.partition("_")[0] / images]
    return " and ".join(f"no {path}" for path in needed if not path.exists())


def load(network: str, data: Path, images: str = "test") -> tuple[Any, Any, tuple[int, int, int]]:
    """The teacher, its ``images`` with their labels ("test" or "train"), and their shape."""
    if network == "digits_resnet8":
        return dfqlib.load_model(network), dfqlib.load_data("digits", images), (1, 16, 16)
    checkpoint = data / "models" / CHECKPOINTS[network]
    if network == "cifar100_resnet20":  # an architecture that the library does not have
        sys.path.insert(0, str(ROOT / "tests"))
        from cifar100_resnet20 import MEAN, STD, Cifar100ResNet20

        teacher = dfqlib.load_checkpoint(Cifar100ResNet20(), checkpoint)
        return teacher, dfqlib.image_folder(data / "cifar100" / images, MEAN, STD), (3, 32, 32)
    known = dfqlib.models.info(network)
    teacher = dfqlib.load_model(network, checkpoint=checkpoint)
    folder = dfqlib.image_folder(data / "cifar10" / images, known.mean, known.std, classes=known.classes)
    return teacher, folder, known.image_shape


def real_images(network: str, data: Path) -> Any:
    """Training images for the recipe "real", spread over the classes."""
    import torch

    _, loader, _ = load(network, data, "train")
    images = torch.cat([images for images, _ in loader])
    return images[torch.linspace(0, len(images) - 1, REAL_IMAGES).long()]
