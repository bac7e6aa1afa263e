"""Folders of large images: read when needed, scaled and cropped like ImageNet's evaluation, faults in one line."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dfqlib import data
from dfqlib.errors import InputError
from dfqlib.network._torchvision import import_torchvision

NORMALIZED: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.1)}
SIZES = {"a": (40, 30), "b": (30, 50), "c": (33, 33)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, one photograph-like image of another size in each."""
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name / "0.png")
    return tmp_path / "images"


def read(folder: Path, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return data.images_and_labels(data.image_folder(folder, **NORMALIZED, **options))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_those_of_torchvisions_usual_transforms(folder: Path, workers: int) -> None:
    transforms = import_torchvision().transforms
    usual = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
            transforms.Normalize(NORMALIZED["mean"], NORMALIZED["std"]),
        ]
    )
    expected = [usual(Image.open(folder / name / "0.png").convert("RGB")) for name in SIZES]
    images, labels = read(folder, size=28, workers=workers, batch_size=2)
    torch.testing.assert_close(images, torch.stack(expected))
    assert labels.tolist() == [0, 1, 2]


def test_a_network_with_more_classes_than_the_folder_gives_their_order(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("z\nc\nb\n\na\n")
    for classes in (["z", "c", "b", "a"], tmp_path / "classes.txt", str(tmp_path / "classes.txt")):
        assert read(folder, size=28, classes=classes)[1].tolist() == [3, 2, 1]


def test_no_image_is_read_before_it_is_needed(folder: Path) -> None:
    (folder / "c" / "0.png").write_bytes(b"no image")
    batches = iter(data.image_folder(folder, **NORMALIZED, size=28, batch_size=2))
    assert next(batches)[1].tolist() == [0, 1]
    with pytest.raises(InputError, match=r'c/0\.png" is no image that can be read'):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_line_by_worker_processes_too(folder: Path, workers: int) -> None:
    (folder / "b" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        read(folder, size=28, workers=workers)
    assert str(caught.value) == f'"{folder / "b" / "0.png"}" is no image that can be read; remove it or save it again'


def test_broken_images_are_skipped_and_named_at_the_end_where_asked(folder: Path) -> None:
    (folder / "b" / "0.png").write_bytes(b"no image")
    loader = data.image_folder(folder, **NORMALIZED, size=28, broken="skip", batch_size=1)
    with pytest.warns(UserWarning, match=r'1 of 3 images were left out: ".*b/0\.png" is no image'):
        assert [labels.tolist() for _, labels in loader] == [[0], [2]]


def test_an_image_is_scaled_up_to_the_crop_or_refused_where_nothing_is_scaled(folder: Path) -> None:
    assert read(folder, size=64)[0].shape == (3, 3, 64, 64)
    with pytest.raises(InputError, match=r'a/0\.png" is 40x30, smaller than size=32; give resize='):
        read(folder, size=32, resize=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(folder, size=30, resize=0)[0].shape == (3, 3, 30, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 28, "resize": 20}, "size=28, resize=20.*raise resize"),
        ({"size": 0}, "size=0 must be a whole number of at least 1"),
        ({"size": 28.0}, r"size=28\.0 must be a whole number"),
        ({"size": 28, "resize": -1}, "resize=-1 must be a whole number of at least 0"),
        ({"size": 28, "workers": -1}, "workers=-1 must be a whole number of at least 0"),
        ({"resize": 32}, "resize=32 needs size="),
        ({"size": 28, "broken": "ignore"}, "broken='ignore' must be"),
        ({"size": 28, "classes": "absent.txt"}, 'classes="absent.txt" is no text file'),
        ({}, "the images before it .*; make all of one size, or give size="),
    ],
)
def test_options_that_cannot_be_used_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(folder, **options)


def test_a_data_set_of_one_size_takes_no_size() -> None:
    with pytest.raises(InputError, match=r'size=None, resize=20: dataset="digits" has one size'):
        data.load_data("digits", resize=20)


def test_imagenet_is_read_where_all_classes_are_known(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs the folder .*val with <wnid>/<image>; give data_root="):
        data.load_data("imagenet", data_root=tmp_path)
    (tmp_path / "imagenet").mkdir()
    folder.rename(tmp_path / "imagenet" / "val")
    with pytest.raises(InputError, match=r"has 3 classes in .*val, not 1,000: give classes="):
        data.load_data("imagenet", data_root=tmp_path)
    names = [f"n{index:04}" for index in range(997)]
    (tmp_path / "imagenet" / "classes.txt").write_text("\n".join([*names, *SIZES]))
    images, labels = data.images_and_labels(data.load_data("imagenet", data_root=tmp_path))
    assert images.shape == (3, 3, 224, 224)
    assert labels.tolist() == [997, 998, 999]


def test_real_photographs_have_the_classes_of_the_networks_outputs(shared_data: Path) -> None:
    loader = data.load_data("imagenet", data_root=shared_data, batch_size=8)
    assert len(loader.dataset) == 1300  # type: ignore[arg-type]
    images, labels = data.images_and_labels(loader, 8)
    assert images.shape == (8, 3, 224, 224)
    assert labels.max() < 10  # the first folders
