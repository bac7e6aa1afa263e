"""Networks by name: trained ones, and the architectures of the papers with random weights."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dfqlib.data import CIFAR10_CLASSES, DIGIT_CLASSES, NORMALIZATION, load_data
from dfqlib.errors import InputError
from dfqlib.models.checkpoints import load_checkpoint, normalize_sha256
from dfqlib.models.lenet import LeNet5
from dfqlib.models.mobilenet import MobileNetV2
from dfqlib.models.resnet import CifarResNet, ResNet8, ResNet18, ResNet34
from dfqlib.models.vgg import VGG
from dfqlib.models.wide_resnet import WideResNet


@dataclass(frozen=True)
class ModelInfo:
    """A network with a public or bundled checkpoint.

    Attributes:
        name: the name :func:`load_model` takes.
        build: makes the network with random weights.
        image_shape: (C, H, W) of one image.
        classes: class names in the order of the logits; empty when unknown.
        mean: per channel of images in [0, 1]; empty when unknown.
        std: likewise.
        url: of the checkpoint; None when it is bundled.
        sha256: of the checkpoint, or its first 8 hex digits where no more is published.
        published_top1: percent, as its authors report it.
        source: who trained it, and on what.
    """

    name: str
    build: Callable[[], nn.Module]
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    url: str | None = None
    sha256: str | None = None
    published_top1: float | None = None
    source: str = ""

    def load_images(
        self,
        dataset: str,
        split: str = "test",
        *,
        data_root: str | PathLike[str] | None = None,
        resize: int | None = None,
        what: str = "",
    ) -> DataLoader[tuple[Tensor, int]]:
        """The labeled images of ``data.load_data``, with the network's preprocessing and class order.

        Args:
            dataset: as in ``data.load_data``.
            split: likewise.
            data_root: likewise.
            resize: scale the shorter side of a folder's images to this many pixels and crop their center to the
                network's size; None takes them as they are.
            what: name of the images in messages; ``dataset="..."`` when empty.

        Raises:
            InputError: as ``data.load_data``, or the images have another shape than the network takes.
        """
        known: dict[str, Any] = {name: getattr(self, name) or None for name in ("mean", "std", "classes")}
        size = self.image_shape[1] if resize is not None or dataset == "imagenet" else None
        loader = load_data(dataset, split, data_root=data_root, size=size, resize=resize, **known)
        found = tuple(next(iter(loader))[0].shape[1:])
        if found != tuple(self.image_shape):
            what = what or f'dataset="{dataset}"'
            raise InputError(
                f"{what} has images of shape {found}, the network takes {self.image_shape}; resize them, or "
                "have those of a folder scaled and cropped by resize= (--resize)"
            )
        return loader


def _cifar10(depth: int, sha256: str, top1: float) -> ModelInfo:
    mean, std = NORMALIZATION["cifar10"]
    repository = "https://github.com/akamaster/pytorch_resnet_cifar10"
    return ModelInfo(
        name=f"cifar10_resnet{depth}",
        build=partial(CifarResNet, depth),
        image_shape=(3, 32, 32),
        classes=CIFAR10_CLASSES,
        mean=mean,
        std=std,
        url=f"{repository}/raw/master/pretrained_models/resnet{depth}-{sha256[:8]}.th",
        sha256=sha256,
        published_top1=top1,
        source=f"Yerlan Idelbayev, {repository}, trained on CIFAR-10",
    )


_MODELS = (
    ModelInfo(
        name="digits_resnet8",
        build=ResNet8,
        image_shape=(1, 16, 16),
        classes=DIGIT_CLASSES,
        mean=NORMALIZATION["digits"][0],
        std=NORMALIZATION["digits"][1],
        url=None,
        sha256="4d9b782b2476a7a856639c991906c306dcfa0e8cd39f30a55c9a38a81d3be7fd",
        published_top1=None,
        source="tools/train_digits.py, trained on scikit-learn's digits",
    ),
    _cifar10(20, "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8", 91.73),
    _cifar10(32, "d509ac18", 92.63),
    _cifar10(44, "014dd654", 93.10),
    _cifar10(56, "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367", 93.39),
)


def names() -> tuple[str, ...]:
    """The names that :func:`info` and :func:`load_model` know."""
    return tuple(model.name for model in _MODELS)


def info(name: str) -> ModelInfo:
    """Shape, classes, preprocessing and origin of a network.

    Raises:
        InputError: no network has this name.
    """
    for model in _MODELS:
        if model.name == name:
            return model
    if name in architectures() or _WIDE_RESNET.fullmatch(name):
        raise InputError(
            f'arch="{name}" has no public weights here; with your own checkpoint: '
            f'load_checkpoint(models.build("{name}", classes=...), checkpoint)'
        )
    raise InputError(f'arch="{name}" is unknown; known are {", ".join(names())}')


_ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "lenet5": LeNet5,
    "lenet5_half": partial(LeNet5, half=True),
    "cifar_resnet18": ResNet18,
    "cifar_resnet34": ResNet34,
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56)},
    **{f"vgg{depth}_bn": partial(VGG, depth) for depth in (11, 13, 16, 19)},
    "mobilenet_v2": MobileNetV2,
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth in (16, 40) for width in (1, 2)},
}
_WIDE_RESNET = re.compile(r"wrn_(\d{1,4})_(\d{1,3})")


def architectures() -> tuple[str, ...]:
    """The names that :func:`build` knows, beside wide ResNets of any other depth and width."""
    return tuple(_ARCHITECTURES)


def build(name: str, classes: int = 10) -> nn.Module:
    """A network of the papers with random weights.

    LeNet-5 takes images of shape (1, 28, 28), all others (3, 32, 32). The classes in ``dfqlib.models`` have further
    options.

    Args:
        name: one of :func:`architectures`, or "wrn_<depth>_<width>".
        classes: number of classes, at least 2.

    Raises:
        InputError: unknown name, a wide ResNet of a depth that does not exist, or fewer than two classes.

    Taught in notebook 05.
    """
    if classes < 2:
        raise InputError(f"classes={classes} is too few to tell apart; give 2 or more")
    wide = _WIDE_RESNET.fullmatch(name)
    if wide:
        return WideResNet(int(wide[1]), int(wide[2]), classes)
    if name not in _ARCHITECTURES:
        raise InputError(f'name="{name}" is unknown; known are {", ".join(architectures())}')
    return _ARCHITECTURES[name](classes)


def load_model(name: str, *, checkpoint: str | PathLike[str] | None = None, sha256: str | None = None) -> nn.Module:
    """A trained network in eval mode, on the CPU.

    Args:
        name: one of :func:`names`.
        checkpoint: a file, or an https URL together with ``sha256``. None takes the bundled file, or downloads the
            registered URL once into torch.hub's cache.
        sha256: expected SHA-256 of the checkpoint in hex, or its first 8 or more digits.

    Returns:
        The network; it takes images ``(B, *info(name).image_shape)``, normalized by ``info(name).mean`` and ``.std``.

    Raises:
        InputError: unknown name, a URL that cannot be fetched, or a file that :func:`load_checkpoint` refuses.
        NonFiniteError: a weight is NaN or infinite.

    Taught in notebook 07.
    """
    known = info(name)
    if checkpoint is None:
        sha256 = sha256 or known.sha256
        checkpoint = known.url or Path(__file__).parents[1] / "assets" / f"{name}.safetensors"
    if isinstance(checkpoint, str) and "://" in checkpoint:
        checkpoint = _fetch(checkpoint, sha256)
    return load_checkpoint(known.build(), checkpoint, sha256=sha256)


def _fetch(url: str, sha256: str | None) -> Path:
    """The file of a URL, downloaded unless torch.hub's cache has it."""
    if not url.startswith("https://"):
        raise InputError(f'checkpoint="{url}": only https URLs are fetched; download it yourself and give the path')
    if sha256 is None:
        raise InputError(f'checkpoint="{url}" needs sha256= too, to check the downloaded file')
    prefix = normalize_sha256(sha256)
    file_name = Path(url.partition("?")[0]).name
    if prefix[:8] not in file_name:  # two URLs may end in the same file name
        file_name = f"{prefix[:8]}-{file_name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
    except (URLError, OSError) as error:
        raise InputError(
            f'"{url}" cannot be fetched ({error}); download it elsewhere and give checkpoint=<file>'
        ) from None
    except RuntimeError as error:  # torch.hub found another hash
        raise InputError(f'"{url}": {error}; the file there has changed, correct sha256=') from None
    return path
