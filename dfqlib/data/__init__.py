"""Labeled images for evaluation: scikit-learn's digits, torchvision's data sets, image folders, and a toy set.

Loaders yield ``(images, labels)`` in a fixed order, with images normalized as ``(x - mean) / std`` per channel, x in
[0, 1]. Data-free quantization itself needs none of them.
"""

import os
from collections.abc import Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfqlib.data import folders
from dfqlib.data.folders import Broken
from dfqlib.errors import InputError
from dfqlib.network._torchvision import import_torchvision

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGIT_CLASSES = tuple("0123456789")
IMAGENET_CLASSES = 1000

NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3052,), (0.3185,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation per channel that the networks of ``dfqlib.models`` and the literature use."""


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images stored as bytes and normalized on access.

    Attributes:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,), positions in ``classes``.
        classes: names of the classes.
        mean: per channel of images in [0, 1], shape (C, 1, 1).
        std: likewise.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        _require_normalization(mean, std)
        if len(mean) != images.shape[1]:
            raise InputError(
                f"mean={tuple(mean)} has {len(mean)} channels, the images {images.shape[1]}; give one each"
            )
        self.images, self.labels, self.classes = images, labels, tuple(classes)
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Normalized image (C, H, W) and its label."""
        return (self.images[index].float() / 255 - self.mean) / self.std, int(self.labels[index])


def load_data(
    name: str,
    split: str = "test",
    *,
    data_root: str | PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | str | PathLike[str] | None = None,
    size: int | None = None,
    resize: int | None = None,
    batch_size: int = 256,
) -> DataLoader[tuple[Tensor, int]]:
    """A data set by name.

    Args:
        name: "digits" (needs no download), "mnist", "cifar10", "cifar100", "svhn", "imagenet", or "folder:<path>".
        split: "train" or "test"; ignored for a folder.
        data_root: folder of torchvision's data sets, downloaded if missing; None for the environment variable
            DFQLIB_DATA, or else ``~/.cache/dfqlib``. ImageNet is not downloaded: ``imagenet/val/<wnid>/<image>`` must
            be in it, and ``imagenet/classes.txt`` with all 1,000 names if folders are missing.
        mean: per channel, of images in [0, 1]; None for ``NORMALIZATION[name]``. A folder requires it.
        std: likewise.
        classes: for a folder and ImageNet, see :func:`image_folder`.
        size: for a folder and ImageNet (None for 224 there), see :func:`image_folder`.
        resize: likewise.
        batch_size: images per batch.

    Returns:
        DataLoader over an :class:`ImageDataset` or a ``folders.FolderDataset``; batches of images (B, C, H, W) and
        labels (B,).

    Raises:
        InputError: unknown name or split, data neither on disk nor downloadable, a folder without mean and std.

    Taught in notebook 07.
    """
    if split not in ("train", "test"):
        raise InputError(f'split="{split}" is unknown; take "train" or "test"')
    if name.startswith("folder:"):
        if mean is None or std is None:
            raise InputError(f'dataset="{name}" needs mean= and std=, those the network was trained with')
        return image_folder(
            name.removeprefix("folder:"), mean, std, size, classes, resize=resize, batch_size=batch_size
        )
    if name not in NORMALIZATION:
        raise InputError(f'dataset="{name}" is unknown; known are {", ".join(NORMALIZATION)} and "folder:<path>"')
    if name != "imagenet" and (size is not None or resize is not None):
        raise InputError(f'size={size}, resize={resize}: dataset="{name}" has one size; they are for folders')
    own_mean, own_std = NORMALIZATION[name]
    mean, std = own_mean if mean is None else mean, own_std if std is None else std
    root = Path(data_root or os.environ.get("DFQLIB_DATA") or Path.home() / ".cache" / "dfqlib")
    if name == "imagenet":
        return _imagenet(root / "imagenet", split, mean, std, size or 224, resize, classes, batch_size)
    images, labels, own_classes = _digits(split) if name == "digits" else _from_torchvision(name, split, root)
    return DataLoader(ImageDataset(images, labels, own_classes, mean, std), batch_size)


def image_folder(
    path: str | PathLike[str],
    mean: Sequence[float],
    std: Sequence[float],
    size: int | None = None,
    classes: Sequence[str] | str | PathLike[str] | None = None,
    *,
    resize: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    broken: Broken = "raise",
) -> DataLoader[tuple[Tensor, int]]:
    """Images of a folder ``<class>/<image>``, ordered by class and file name.

    Without ``size`` all images must be of one size and are read into memory once. With it they are read as they are
    needed, so that memory does not grow with their number: each is scaled to ``resize`` and its center is cropped.

    Args:
        path: folder with one folder per class.
        mean: per channel, of images in [0, 1]. One value reads the images as gray, three as RGB.
        std: likewise.
        size: height and width of the crop, in pixels, for example 224.
        classes: class names in the order of the network's outputs, of which the folder may have a subset, or a text
            file with one name per line. None numbers the sorted folder names.
        resize: length of an image's shorter side before the crop; None for 8/7 of ``size`` (256 for 224), 0 crops the
            images as they are.
        batch_size: images per batch.
        workers: processes that read images, with ``size``; 0 reads them in this one.
        broken: with ``size``, "raise" at the first image that cannot be read, or "skip" such images and name them in
            one warning at the end of each pass.

    Returns:
        DataLoader over an :class:`ImageDataset`, or with ``size`` over a ``folders.FolderDataset``.

    Raises:
        InputError: a missing or empty folder or class, a folder that is not a class, a file that is not an image,
            images of different sizes, or smaller than the crop.

    Taught in notebook 07.
    """
    _require_normalization(mean, std)
    if broken not in ("raise", "skip"):
        raise InputError(f'broken={broken!r} must be "raise" or "skip"')
    files, folders_of, folder_names = folders.find_images(str(path))
    names = _class_names(folder_names, classes, f'image folder "{path}"')
    labels = [names.index(folder_names[folder]) for folder in folders_of]
    if size is None:
        if resize is not None:
            raise InputError(f"resize={resize} needs size=, the height and width of the crop")
        images = folders.read_all(files, "L" if len(mean) == 1 else "RGB")
        return DataLoader(ImageDataset(images, torch.tensor(labels), names, mean, std), batch_size)
    for argument, value, least in (("size", size, 1), ("resize", resize, 0), ("workers", workers, 0)):
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < least):
            raise InputError(f"{argument}={value!r} must be a whole number of at least {least}")
    resize = round(size * 8 / 7) if resize is None else resize
    if 0 < resize < size:
        raise InputError(f"size={size}, resize={resize}: images must not be smaller than the crop; raise resize")
    dataset = folders.FolderDataset(files, labels, names, mean, std, size, resize)
    return folders.FolderLoader(dataset, batch_size, workers, broken)


def _class_names(found: Sequence[str], classes: Sequence[str] | str | PathLike[str] | None, what: str) -> list[str]:
    """The names of all classes, in the order of the network's outputs."""
    if isinstance(classes, str | PathLike):
        try:
            lines = Path(classes).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError(f'classes="{classes}" is no text file with a class name per line') from None
        classes = [line.strip() for line in lines if line.strip()]
    names = list(found if classes is None else classes)
    if len(set(names)) < len(names):
        raise InputError(f"classes: {max(names, key=names.count)!r} is named twice; give each class once")
    unknown = [name for name in found if name not in names]
    if unknown:
        raise InputError(f"{what} holds {', '.join(unknown[:5])}, not among classes= ({', '.join(names[:10])}, …)")
    return names


def images_and_labels(loader: DataLoader[tuple[Tensor, int]], limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``limit`` images (N, C, H, W) and labels (N,) of a loader as two tensors.

    Raises:
        InputError: ``limit`` is below 1, or the loader is empty.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} must be at least 1, or None for all images")
    batches: list[tuple[Tensor, Tensor]] = []
    for batch in loader:
        batches.append(batch)
        if limit is not None and sum(len(labels) for _, labels in batches) >= limit:
            break
    if not batches:
        raise InputError("the loader holds no images")
    images, labels = (torch.cat(parts)[:limit] for parts in zip(*batches, strict=True))
    return images, labels


def toy_boundary(n: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of two classes, separated by a sine wave (after GDFQ, section 5.2 and Fig. 1).

    Points are uniform on [-4, 4] x [-4, 4]; class 1 lies above the curve ``x2 = 2 sin(x1)``, class 0 below it. Both
    classes are equally likely.

    Args:
        n: number of points, at least 1.
        seed: seed of the points.

    Returns:
        Points, float32 of shape (n, 2), and labels, int64 of shape (n,).

    Raises:
        InputError: ``n`` is below 1.

    Taught in notebook 01.
    """
    if n < 1:
        raise InputError(f"n={n} must be at least 1")
    points = 8 * torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) - 4
    return points, (points[:, 1] > 2 * torch.sin(points[:, 0])).long()


def check_image_shape(image_shape: Any) -> None:
    """Raise InputError unless ``image_shape`` is (channels, height, width)."""
    sides = list(image_shape) if isinstance(image_shape, tuple | list) else []
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) and int(side) > 0 for side in sides)
    if len(sides) != 3 or not whole:
        raise InputError(f"image_shape={image_shape!r} must be (channels, height, width), for example (3, 32, 32)")


def _require_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sequence | np.ndarray | Tensor) or isinstance(values, str):
            raise InputError(f"{name}={values!r} must be one value per channel, for example (0.5,) or (0.5, 0.5, 0.5)")
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise InputError(f"mean={tuple(mean)}, std={tuple(std)}: give one value each for gray images, three for RGB")
    if not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise InputError(f"mean={tuple(mean)}, std={tuple(std)}: values must be finite and std above 0")
    if max(*mean, *std) > 1:
        raise InputError(
            f"mean={tuple(mean)}, std={tuple(std)} are of images in 0 to 255, not in [0, 1]; divide them by 255"
        )


def _digits(split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """scikit-learn's 1,797 digits at 16x16, in a fixed stratified split of 1,297 and 500."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError('dataset="digits" needs scikit-learn; pip install "dfqlib[notebooks]"') from error

    bunch: Any = load_digits()
    parts = train_test_split(np.arange(len(bunch.target)), test_size=500, stratify=bunch.target, random_state=0)
    chosen = torch.from_numpy(np.sort(parts[split == "test"]))
    gray = torch.from_numpy(bunch.images).float()[chosen, None] * (255 / 16)  # stored as 0 … 16
    images = F.interpolate(gray, size=16, mode="bilinear").round().to(torch.uint8)
    return images, torch.from_numpy(bunch.target)[chosen].long(), DIGIT_CLASSES


def _imagenet(
    root: Path, split: str, mean: Sequence[float], std: Sequence[float], size: int, resize: int | None,
    classes: Sequence[str] | str | PathLike[str] | None, batch_size: int,
) -> DataLoader[tuple[Tensor, int]]:  # fmt: skip
    """ImageNet's folders, of which some may be missing where the names of all classes are known."""
    folder = root / ("val" if split == "test" else "train")
    if not folder.is_dir():
        raise InputError(f'dataset="imagenet" needs the folder {folder} with <wnid>/<image>; give data_root=')
    if classes is None and (root / "classes.txt").is_file():
        classes = root / "classes.txt"
    loader = image_folder(folder, mean, std, size, classes, resize=resize, batch_size=batch_size)
    count = len(loader.dataset.classes)  # type: ignore[attr-defined]
    if count != IMAGENET_CLASSES:
        raise InputError(
            f'dataset="imagenet" has {count} classes in {folder}, not {IMAGENET_CLASSES:,}: give classes=, a file with '
            f"the names of all in the order of the network's outputs, or put it at {root / 'classes.txt'}"
        )
    return loader


def _from_torchvision(name: str, split: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (N, C, H, W) as bytes, labels, class names; torchvision downloads and checks missing files."""
    datasets = import_torchvision().datasets
    try:
        if name == "svhn":
            found = datasets.SVHN(str(root), split=split, download=True)
            return torch.from_numpy(found.data), torch.from_numpy(found.labels).long(), DIGIT_CLASSES
        kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        found = kind(str(root), train=split == "train", download=True)
    except (URLError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f'dataset="{name}" is not usable under data_root="{root}" and cannot be fetched ({reason}); '
            "give data_root= of a copy in torchvision's layout"
        ) from None
    labels = torch.as_tensor(found.targets)
    if name == "mnist":
        return found.data[:, None], labels, DIGIT_CLASSES
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), labels, tuple(found.classes)
