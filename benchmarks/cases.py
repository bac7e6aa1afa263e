"""What is measured: networks with their test images, widths and protocols."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT

REAL_IMAGES = 1024
"""How many training images the recipe "real" gets; all are seen several times in its steps."""


@dataclass(frozen=True)
class Case:
    """A network, its test images and the widths; the protocol's name goes into the tables."""

    network: str
    bits: str
    protocol: str = "first and last at 8 bits"
    spec: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()


def _all_layers(bits: int) -> dict[str, Any]:
    return {"protocol": "all layers, per channel", "spec": (("edge_bits", bits), ("granularity", "channel"))}


CASES = {
    "digits_w2a2": Case("digits_resnet8", "w2a2"),
    "digits_w3a3": Case("digits_resnet8", "w3a3"),
    "digits_w2a2_short": Case(
        "digits_resnet8",
        "w2a2",
        "first and last at 8 bits; 128 images, 150 + 200 steps",
        settings=(("images", 128), ("synthesis_steps", 150), ("steps", 200)),
    ),
    "cifar10_w4a4": Case("cifar10_resnet20", "w4a4"),
    "cifar10_w3a3": Case("cifar10_resnet20", "w3a3"),
    "cifar10_w2a2": Case("cifar10_resnet20", "w2a2"),
    "cifar10_w2a2_long": Case(
        "cifar10_resnet20",
        "w2a2",
        "first and last at 8 bits; 1,024 images, 6,000 steps",
        settings=(("images", 1024), ("steps", 6000)),
    ),
    "cifar10_w4a4_all": Case("cifar10_resnet20", "w4a4", **_all_layers(4)),
    "cifar10_w3a3_all": Case("cifar10_resnet20", "w3a3", **_all_layers(3)),
    "cifar100_w4a4": Case("cifar100_resnet20", "w4a4"),
    "cifar100_w4a4_all": Case("cifar100_resnet20", "w4a4", **_all_layers(4)),
    "cifar10_resnet56_w4a4": Case("cifar10_resnet56", "w4a4"),
    "cifar10_resnet56_w4a4_all": Case("cifar10_resnet56", "w4a4", **_all_layers(4)),
}
"""On CIFAR-100 and ResNet-56 nothing is tuned: what was chosen on ResNet-20 is confirmed there."""

CHECKPOINTS = {
    "cifar10_resnet20": "resnet20-12fca82f.th",
    "cifar10_resnet56": "resnet56-4bfd9763.th",
    "cifar100_resnet20": "resnet20_cifar100.pth",
}


def absent(network: str, data: Path) -> list[Path]:
    """The checkpoint and the folder of test images that this network needs and ``data`` does not have."""
    if network not in CHECKPOINTS:
        return []
    needed = [data / "models" / CHECKPOINTS[network], data / network.partition("_")[0] / "test"]
    return [path for path in needed if not path.exists()]


def load(network: str, data: Path) -> tuple[Any, Any, tuple[int, int, int]]:
    """The teacher, its test images and their shape."""
    import dfqlib

    if network == "digits_resnet8":
        return dfqlib.load_model(network), dfqlib.load_data("digits"), (1, 16, 16)
    checkpoint = data / "models" / CHECKPOINTS[network]
    if network == "cifar100_resnet20":  # an architecture that the library does not have
        sys.path.insert(0, str(ROOT / "tests"))
        from cifar100_resnet20 import MEAN, STD, Cifar100ResNet20

        teacher = dfqlib.load_checkpoint(Cifar100ResNet20(), checkpoint)
        return teacher, dfqlib.image_folder(data / "cifar100/test", MEAN, STD), (3, 32, 32)
    known = dfqlib.models.info(network)
    teacher = dfqlib.load_model(network, checkpoint=checkpoint)
    folder = dfqlib.image_folder(data / "cifar10/test", known.mean, known.std, classes=known.classes)
    return teacher, folder, known.image_shape


def real_images(network: str, data: Path) -> Any:
    """Training images for the recipes that take some, spread over the classes."""
    import torch

    import dfqlib

    if network == "digits_resnet8":
        loader = dfqlib.load_data("digits", "train")
    else:
        known = dfqlib.models.info(network)
        loader = dfqlib.image_folder(data / "cifar10/train", known.mean, known.std, classes=known.classes)
    images = torch.cat([images for images, _ in loader])
    return images[torch.linspace(0, len(images) - 1, REAL_IMAGES).long()]
