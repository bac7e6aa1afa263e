"""Loaders keep order, labels and the teacher's preprocessing, and say what is wrong with a folder."""

import math
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from dfqlib import data
from dfqlib.errors import InputError
from dfqlib.models import info
from dfqlib.network._torchvision import import_torchvision

GREY = {"mean": (0.5,), "std": (0.25,)}
COLOUR = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.1)}


def write(path: Path, value: int = 0, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 10, 20)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, written in another order than they are read in; red tells the images apart."""
    for name, value in (("dog/b.png", 4), ("dog/a.png", 3), ("cat/10.png", 1), ("cat/2.png", 2)):
        write(tmp_path / "images" / name, value)
    return tmp_path / "images"


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        data.image_folder(path, **{**COLOUR, **options})
    message = str(caught.value)
    assert "\n" not in message
    return message


# Digits


def test_digits_split_is_stratified_disjoint_and_fixed() -> None:
    sets = {split: data.load_data("digits", split).dataset for split in ("train", "test")}
    assert {split: len(d) for split, d in sets.items()} == {"train": 1297, "test": 500}
    counts = torch.stack([torch.bincount(d.labels) / len(d) for d in sets.values()])
    assert torch.allclose(counts[0], counts[1], atol=0.002)
    pixels = {split: {image.numpy().tobytes() for image in d.images} for split, d in sets.items()}
    assert not pixels["train"] & pixels["test"]
    assert sets["test"].labels[:12].tolist() == [0, 1, 4, 5, 8, 5, 6, 5, 9, 9, 1, 3]


def test_digits_normalization_is_that_of_the_training_images() -> None:
    images = data.load_data("digits", "train").dataset.images.float() / 255
    mean, std = data.NORMALIZATION["digits"]
    assert images.mean().item() == pytest.approx(mean[0], abs=1e-4)
    assert images.std().item() == pytest.approx(std[0], abs=1e-4)


def test_digits_fit_their_teacher() -> None:
    images, labels = data.images_and_labels(data.load_data("digits"))
    assert images.shape[1:] == info("digits_resnet8").image_shape
    assert data.load_data("digits").dataset.classes == info("digits_resnet8").classes
    assert (info("digits_resnet8").mean, info("digits_resnet8").std) == data.NORMALIZATION["digits"]
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


# torchvision's sets


def test_mnist_is_read_from_the_data_root(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = data.load_data("mnist", data_root=shared_data)
    images, labels = data.images_and_labels(loader)
    assert images.shape == (10_000, 1, 28, 28)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(images.mean().item()) < 0.01
    assert images.std().item() == pytest.approx(1, abs=0.01)
    monkeypatch.setenv("DFQLIB_DATA", str(shared_data))
    assert torch.equal(data.load_data("mnist").dataset.labels, labels)


class FakeCifar:
    """Two images in torchvision's layout: height, width, channel."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.data = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
        self.targets, self.classes = [1, 0], ["apple", "bear"]


class FakeSvhn:
    """Two images in torchvision's layout: channel, height, width."""

    def __init__(self, root: str, split: str, download: bool) -> None:
        self.data = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
        self.labels = np.array([1, 0])


@pytest.mark.parametrize(("name", "attribute"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("svhn", "SVHN")])
def test_channels_come_first_whatever_torchvision_stores(
    name: str, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSvhn if name == "svhn" else FakeCifar
    monkeypatch.setattr(import_torchvision().datasets, attribute, fake)
    images, labels = data.images_and_labels(data.load_data(name, mean=(0, 0, 0), std=(1, 1, 1)))
    assert images.shape == (2, 3, 4, 4)
    assert labels.tolist() == [1, 0]
    neighbour = images[0, 0, 0, 1] - images[0, 0, 0, 0]
    assert neighbour.item() == pytest.approx((1 if name == "svhn" else 3) / 255)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("File not found or corrupted.\nmore")])
def test_without_a_network_one_line_names_data_root(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(import_torchvision().datasets, "CIFAR10", fail)
    with pytest.raises(InputError, match=r'dataset="cifar10".*data_root=') as caught:
        data.load_data("cifar10", data_root=tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_damaged_files_under_the_data_root_are_an_input_error(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"\x00\x00\x08\x03\x00\x00")
    with pytest.raises(InputError, match=r'dataset="mnist".*data_root='):
        data.load_data("mnist", data_root=tmp_path)


def test_unknown_names_and_splits_list_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"letters.*digits, mnist, cifar10, cifar100, svhn, imagenet.*folder:<path>"):
        data.load_data("letters")
    with pytest.raises(InputError, match=r'split="validation".*"train" or "test"'):
        data.load_data("digits", "validation")


# Folders


def test_a_folder_is_read_in_order_of_class_and_file_name(folder: Path) -> None:
    images, labels = data.images_and_labels(data.image_folder(folder, mean=(0, 0, 0), std=(1, 1, 1), batch_size=3))
    assert (images[:, 0, 0, 0] * 255).tolist() == pytest.approx([1, 2, 3, 4])
    assert labels.tolist() == [0, 0, 1, 1]
    assert images.shape == (4, 3, 4, 6)  # height before width


def test_images_are_normalized_per_channel(folder: Path) -> None:
    image, label = data.image_folder(folder, **COLOUR).dataset[3]
    expected = [(v / 255 - m) / s for v, m, s in zip((4, 10, 20), COLOUR["mean"], COLOUR["std"], strict=True)]
    assert image[:, 1, 2].tolist() == pytest.approx(expected, abs=1e-6)
    assert label == 1


def test_labels_are_positions_in_the_given_classes(folder: Path) -> None:
    loader = data.image_folder(folder, **COLOUR, classes=("ant", "dog", "cat", "eel"))
    assert data.images_and_labels(loader)[1].tolist() == [2, 2, 1, 1]
    assert loader.dataset.classes == ("ant", "dog", "cat", "eel")


def test_one_value_of_mean_reads_grey_images(tmp_path: Path) -> None:
    write(tmp_path / "0" / "a.png", 51, mode="L")
    image, _ = data.image_folder(tmp_path, **GREY).dataset[0]
    assert image.shape == (1, 4, 6)
    assert image[0, 0, 0].item() == pytest.approx((0.2 - 0.5) / 0.25)


def test_a_folder_by_name_is_the_same_folder(folder: Path) -> None:
    by_name = data.load_data(f"folder:{folder}", **COLOUR, classes=("dog", "cat"), batch_size=2)
    assert by_name.batch_size == 2
    assert by_name.dataset.labels.tolist() == [1, 1, 0, 0]
    with pytest.raises(InputError, match="needs mean= and std="):
        data.load_data(f"folder:{folder}")


def test_files_that_are_no_images_by_name_are_passed_over(folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("kept beside the images")
    (folder / "README.md").write_text("not a class")
    assert len(data.image_folder(folder, **COLOUR).dataset) == 4


def test_real_cifar10_folder_has_the_classes_of_its_networks(shared_data: Path) -> None:
    known = info("cifar10_resnet20")
    loader = data.image_folder(shared_data / "cifar10" / "test", known.mean, known.std)
    assert loader.dataset.classes == known.classes
    assert len(loader.dataset) == 1017


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "absent" in refusal(tmp_path / "absent")
    assert "does not exist" in refusal(tmp_path / "absent")


def test_an_empty_folder_or_class_is_named(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "<class>/<image>" in refusal(tmp_path / "empty")
    (folder / "eel").mkdir()
    assert "eel" in refusal(folder)


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "flat" / "a.png")
    assert "<class>/<image>" in refusal(tmp_path / "flat")


def test_a_folder_that_is_no_class_is_named(folder: Path) -> None:
    message = refusal(folder, classes=("cat", "eel"))
    assert "holds dog, not among classes=" in message


def test_images_of_different_sizes_are_refused_with_both_sizes(folder: Path) -> None:
    write(folder / "dog" / "c.png", size=(8, 4))
    message = refusal(folder)
    assert "c.png" in message
    assert "8x4" in message
    assert "6x4" in message


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_image_is_named(folder: Path, content: bytes | str) -> None:
    whole = (folder / "dog" / "a.png").read_bytes()
    (folder / "dog" / "broken.png").write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    assert "broken.png" in refusal(folder)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.5, 0.5, 0.5)), ((0.5, 0.5), (1, 1)), ((0.5,), (0,)), ((math.nan,), (1,)), ((), ())],
)
def test_impossible_normalization_is_refused(folder: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    assert "mean=" in refusal(folder, mean=mean, std=std)


def test_a_mean_for_colour_does_not_fit_grey_digits() -> None:
    with pytest.raises(InputError, match="3 channels, the images 1"):
        data.load_data("digits", **COLOUR)


# Tensors


def test_images_and_labels_takes_the_first_ones_whatever_the_batch() -> None:
    dataset = TensorDataset(torch.arange(10.0), torch.arange(10))
    for batch in (1, 3, 10):
        images, labels = data.images_and_labels(DataLoader(dataset, batch), limit=5)
        assert labels.tolist() == [0, 1, 2, 3, 4]
        assert images.tolist() == labels.tolist()
    assert len(data.images_and_labels(DataLoader(dataset, 4))[0]) == 10


def test_images_and_labels_needs_something_to_give() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, 1), torch.zeros(0)), 4)
    with pytest.raises(InputError, match="no images"):
        data.images_and_labels(empty)
    with pytest.raises(InputError, match="limit=0"):
        data.images_and_labels(empty, limit=0)


def test_toy_boundary_is_balanced_bounded_and_repeatable() -> None:
    points, labels = data.toy_boundary(n=4000, seed=3)
    assert points.shape == (4000, 2)
    assert (points.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert points.abs().max() <= 4
    assert labels.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(data.toy_boundary(n=4000, seed=3)[0], points)
    assert not torch.equal(data.toy_boundary(n=4000, seed=4)[0], points)
    with pytest.raises(InputError, match="n=0"):
        data.toy_boundary(n=0)


def test_toy_boundary_is_curved() -> None:
    """No straight line separates the classes: the best least-squares one is wrong on many points."""
    points, labels = data.toy_boundary(n=4000)
    inputs = torch.cat([points, torch.ones(4000, 1)], dim=1)
    line = torch.linalg.lstsq(inputs, 2.0 * labels[:, None] - 1).solution
    assert ((inputs @ line)[:, 0] > 0).eq(labels == 1).float().mean() < 0.9


# What folders of other people hold


def grey_folder(place: Path, image: Any, name: str = "0.png") -> DataLoader[Any]:
    (place / "a").mkdir(parents=True, exist_ok=True)
    image.save(place / "a" / name)
    return data.image_folder(place, (0.0,), (1.0,))


def test_images_of_16_bits_are_scaled_to_8(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 8).astype(np.uint16).reshape(2, 4)
    loader = grey_folder(tmp_path, Image.fromarray(values))
    images, _ = data.images_and_labels(loader)
    np.testing.assert_allclose(images[0, 0].numpy(), values / 65535, atol=0.5 / 255)


def test_images_of_32_bit_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.tiff.*mode F.*8 or 16 bits"):
        grey_folder(tmp_path, Image.fromarray(np.ones((2, 2), np.float32)), "0.tiff")


def test_a_rotated_photograph_is_read_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4), np.uint8)
    pixels[0] = 255  # a white line on top
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 270 degrees
    (tmp_path / "a").mkdir()
    upright.rotate(90).save(tmp_path / "a" / "0.png", exif=exif)
    images, _ = data.images_and_labels(data.image_folder(tmp_path, (0.0,), (1.0,)))
    np.testing.assert_array_equal(images[0, 0].numpy(), pixels / 255)


def test_hidden_folders_and_files_are_left_out(tmp_path: Path) -> None:
    loader = grey_folder(tmp_path, Image.new("L", (2, 2)))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "a" / "._0.png").write_bytes(b"no image")
    again = data.image_folder(tmp_path, (0.0,), (1.0,))
    assert len(again.dataset) == len(loader.dataset) == 1  # type: ignore[arg-type]
    assert again.dataset.classes == ("a",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("mean", "std"), [((128.0,) * 3, (64.0,) * 3), ((0.5,), (58.0,))])
def test_normalization_of_images_from_0_to_255_is_refused(tmp_path: Path, mean: Any, std: Any) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="0 to 255"):
        data.image_folder(tmp_path, mean, std)
    with pytest.raises(InputError, match="one value per channel"):
        data.image_folder(tmp_path, 0.5, 0.5)  # type: ignore[arg-type]
