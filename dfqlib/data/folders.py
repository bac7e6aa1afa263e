"""Folders of images ``<class>/<image>``: read into memory once, or resized and cropped as they are needed."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dfqlib.errors import InputError
from dfqlib.network._torchvision import import_torchvision

Broken = Literal["raise", "skip"]
NAMED_FILES = 5
"""How many unreadable files a warning names."""


def find_images(path: str) -> tuple[list[Path], list[int], list[str]]:
    """The image files of a folder, the index of each one's class, and the sorted names of the class folders.

    Hidden files and folders are left out, as are class folders' files of other kinds.

    Raises:
        InputError: no such folder, no class folder in it, or a class without an image.
    """
    what = f'image folder "{path}"'
    if not Path(path).is_dir():
        raise InputError(f"{what} does not exist; give a folder that holds <class>/<image>")
    datasets = import_torchvision().datasets

    class Visible(datasets.ImageFolder):  # type: ignore[name-defined]
        def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
            names, _ = super().find_classes(directory)
            names = [name for name in names if not name.startswith(".")]
            if not names:
                raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
            return names, {name: index for index, name in enumerate(names)}

    def is_image(file: str) -> bool:
        return not Path(file).name.startswith(".") and datasets.folder.is_image_file(file)

    try:
        found = Visible(path, is_valid_file=is_image)
    except OSError as error:
        raise InputError(f"{what} must hold <class>/<image>: {str(error).splitlines()[0]}") from None
    files, labels = zip(*found.samples, strict=True)
    return [Path(file) for file in files], list(labels), found.classes


def read(file: Path, mode: str) -> Any:
    """The Pillow image of a file in ``mode`` ("L" or "RGB"), rotated as EXIF says; 16 bits are rounded to 8.

    Raises:
        InputError: the file is no image, or holds 32-bit numbers, whose range is unknown.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise InputError(
                    f'"{file}" has 32-bit numbers (mode {image.mode}) of unknown range; save it with 8 or 16 bits'
                )
            return image.convert(mode)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise InputError(f'"{file}" is no image that can be read; remove it or save it again') from None


def as_bytes(image: Any) -> Tensor:
    """A Pillow image as uint8, shape (C, H, W)."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def read_all(files: Sequence[Path], mode: str) -> Tensor:
    """Files of one size to one uint8 tensor (N, C, H, W).

    Raises:
        InputError: as ``read``, or the images differ in size.
    """
    images: list[Tensor] = []
    for file in files:
        images.append(as_bytes(read(file, mode)))
        if images[-1].shape != images[0].shape:
            sizes = ["{2}x{1}".format(*image.shape) for image in (images[-1], images[0])]
            raise InputError(
                f'"{file}" is {sizes[0]}, the images before it {sizes[1]}; make all of one size, or give size= '
                "(--resize)"
            )
    return torch.stack(images)


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """Images of a folder that are read, resized and cropped on access, as ImageNet's evaluation does.

    Attributes:
        files: of the images.
        labels: positions in ``classes``.
        classes: names of the classes.
    """

    def __init__(
        self, files: Sequence[Path], labels: Sequence[int], classes: Sequence[str], mean: Sequence[float],
        std: Sequence[float], size: int, resize: int,
    ) -> None:  # fmt: skip
        self.files, self.labels, self.classes = list(files), list(labels), tuple(classes)
        self.size, self.resize, self.mode = size, resize, "L" if len(mean) == 1 else "RGB"
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Normalized image (C, size, size) and its label.

        Raises:
            InputError: the file cannot be read, or is smaller than the crop.
        """
        file, transforms = self.files[index], import_torchvision().transforms.functional
        image = read(file, self.mode)
        if self.resize:
            image = transforms.resize(image, self.resize)
        elif min(image.size) < self.size:
            raise InputError(f'"{file}" is {image.width}x{image.height}, smaller than size={self.size}; give resize=')
        pixels = as_bytes(transforms.center_crop(image, self.size))
        return (pixels.float() / 255 - self.mean) / self.std, self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int] | str]:
        """Several images; an unreadable one is its message, so that a worker process hands it on as it is."""
        items: list[tuple[Tensor, int] | str] = []
        for index in indices:
            try:
                items.append(self[index])
            except InputError as error:
                items.append(str(error))
        return items


class FolderLoader(DataLoader[tuple[Tensor, int]]):
    """Batches of a ``FolderDataset``; unreadable files raise ``InputError``, or are skipped and named at the end."""

    def __init__(self, dataset: FolderDataset, batch_size: int, workers: int, broken: Broken) -> None:
        super().__init__(dataset, batch_size, num_workers=workers, collate_fn=_collate)
        self.broken = broken

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        messages: list[str] = []
        for images, labels, unreadable in super().__iter__():
            if unreadable and self.broken == "raise":
                raise InputError(unreadable[0])
            messages += unreadable
            if len(labels):
                yield images, labels
        if messages:
            more = f" and {len(messages) - NAMED_FILES} more" if len(messages) > NAMED_FILES else ""
            named = "; ".join(messages[:NAMED_FILES])
            count = len(self.dataset)  # type: ignore[arg-type]
            warnings.warn(f"{len(messages)} of {count:,} images were left out: {named}{more}", stacklevel=2)


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    unreadable = [item for item in items if isinstance(item, str)]
    read_items = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in read_items]) if read_items else torch.empty(0)
    return images, torch.tensor([label for _, label in read_items], dtype=torch.long), unreadable
