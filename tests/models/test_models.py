"""Known networks give their published accuracy, and no file can make loading do anything but load."""

import hashlib
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import train_digits
from cifar100_resnet20 import MEAN, STD, Cifar100ResNet20
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from dfqlib import models
from dfqlib.data import image_folder, images_and_labels, load_data
from dfqlib.errors import InputError, NonFiniteError
from dfqlib.models import checkpoints
from dfqlib.models.resnet import PaddedShortcut

ASSETS = Path(models.__file__).parents[1] / "assets"


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(128), labels.split(128), strict=True))


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "small.pt"
    torch.save(small().state_dict(), path)
    return path


def refusal(path: Path, model: nn.Module | None = None, **options: str) -> str:
    """The message of the InputError that loading raises; it is one line, and the model keeps its weights."""
    model = model or small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        models.load_checkpoint(model, path, **options)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


# Known networks


@pytest.mark.parametrize(
    ("name", "file", "right"),
    [
        ("cifar10_resnet20", "resnet20-12fca82f.th", 932),  # 91.64 %
        pytest.param("cifar10_resnet56", "resnet56-4bfd9763.th", 943, marks=pytest.mark.slow),  # 92.72 %
    ],
)
def test_public_cifar10_checkpoints_keep_their_accuracy(shared_data: Path, name: str, file: str, right: int) -> None:
    known = models.info(name)
    model = models.load_model(name, checkpoint=shared_data / "models" / file, sha256=known.sha256)
    loader = image_folder(shared_data / "cifar10" / "test", known.mean, known.std, classes=known.classes)
    images, labels = images_and_labels(loader)
    assert len(images) == 1017
    assert correct(model, images, labels) == right


def test_a_network_the_library_does_not_know_loads_too(shared_data: Path) -> None:
    model = models.load_checkpoint(Cifar100ResNet20(), shared_data / "models" / "resnet20_cifar100.pth")
    images, labels = images_and_labels(image_folder(shared_data / "cifar100" / "test", MEAN, STD))
    assert (correct(model, images, labels), len(images)) == (631, 916)  # 68.9 %


def test_digits_teacher_is_nearly_perfect_on_held_out_digits() -> None:
    images, labels = images_and_labels(load_data("digits", "test"))
    assert correct(models.load_model("digits_resnet8"), images, labels) >= 0.99 * len(images)


def test_digits_teacher_is_small() -> None:
    assert sum(p.numel() for p in models.ResNet8().parameters()) == 44_014
    assert (ASSETS / "digits_resnet8.safetensors").stat().st_size < 250_000


@pytest.mark.parametrize(("depth", "thousands"), [(20, 270), (32, 464), (44, 659), (56, 853)])
def test_resnets_have_the_size_of_the_paper(depth: int, thousands: int) -> None:
    """He et al. 2016, Table 6: 0.27, 0.46, 0.66 and 0.85 million parameters."""
    model = models.info(f"cifar10_resnet{depth}").build()
    assert round(sum(p.numel() for p in model.parameters()) / 1000) == thousands
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


def test_option_a_shortcut_keeps_every_second_pixel_and_pads_with_zeros() -> None:
    x = torch.randn(2, 4, 6, 6)
    y = PaddedShortcut(4, 8)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize("name", models.names())
def test_every_known_network_can_be_traced(name: str) -> None:
    known = models.info(name)
    model = known.build().eval()
    images = torch.randn(2, *known.image_shape)
    logits = model(images)
    assert logits.shape == (2, len(known.classes))
    assert torch.equal(fx.symbolic_trace(model)(images), logits)


def test_loading_leaves_the_network_in_eval_mode() -> None:
    assert not any(m.training for m in models.load_model("digits_resnet8").modules())


def test_registry_names_its_networks() -> None:
    assert models.names() == ("digits_resnet8", *(f"cifar10_resnet{d}" for d in (20, 32, 44, 56)))
    with pytest.raises(InputError, match=r"resnet18.*digits_resnet8, cifar10_resnet20"):
        models.load_model("resnet18")
    with pytest.raises(InputError, match=r"depth=21.*20, 32, 44 or 56"):
        models.CifarResNet(21)


# The bundled teacher can be made again


def test_training_the_teacher_is_reproducible_to_the_byte() -> None:
    once, again, other = (train_digits.as_bytes(train_digits.train(seed, epochs=1)) for seed in (0, 0, 1))
    assert once == again
    assert once != other


def test_bundled_file_is_the_registered_one_and_written_by_the_script() -> None:
    content = (ASSETS / "digits_resnet8.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == models.info("digits_resnet8").sha256
    assert train_digits.as_bytes(models.load_model("digits_resnet8")) == content


# What a checkpoint may look like


def as_saved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights


def as_training_checkpoint(weights: dict[str, Tensor]) -> dict[str, object]:
    return {"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": {"lr": 0.1}}


def as_nested(weights: dict[str, Tensor]) -> dict[str, object]:
    return {"model": {"state_dict": weights}}


def as_data_parallel(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{k}": v for k, v in weights.items()}


def as_compiled_lightning(weights: dict[str, Tensor]) -> dict[str, object]:
    return {"state_dict": {f"model._orig_mod.module.{k}": v for k, v in weights.items()}}


def without_counters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    "wrap",
    [as_saved, as_training_checkpoint, as_nested, as_data_parallel, as_compiled_lightning, without_counters],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_weights_are_found_in_what_training_scripts_write(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object], zipped: bool
) -> None:
    source, path = small(), tmp_path / "checkpoint.pt"
    torch.save(wrap(source.state_dict()), path, _use_new_zipfile_serialization=zipped)
    loaded = models.load_checkpoint(small(), path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items())


def test_a_prefix_the_network_has_itself_is_kept(tmp_path: Path) -> None:
    source, target = nn.ModuleDict({"model": small()}), nn.ModuleDict({"model": small()})
    torch.save(source.state_dict(), tmp_path / "own.pt")
    models.load_checkpoint(target, tmp_path / "own.pt")
    assert torch.equal(target["model"][0].weight, source["model"][0].weight)


def test_safetensors_load_whatever_the_file_is_called(tmp_path: Path) -> None:
    source = small()
    for name in ("weights.safetensors", "weights.bin"):
        save_file(source.state_dict(), tmp_path / name)
        assert torch.equal(models.load_checkpoint(small(), tmp_path / name)[0].weight, source[0].weight)


def test_half_precision_weights_load_into_a_float_network(tmp_path: Path) -> None:
    source = small().half()
    torch.save(source.state_dict(), tmp_path / "half.pt")
    loaded = models.load_checkpoint(small(), tmp_path / "half.pt")
    assert loaded[0].weight.dtype == torch.float32
    assert torch.equal(loaded[0].weight, source[0].weight.float())


def test_the_file_may_be_named_by_a_string_and_checked_by_any_prefix_of_its_hash(saved: Path) -> None:
    digest = hashlib.sha256(saved.read_bytes()).hexdigest()
    for sha256 in (digest, digest[:8], digest.upper()):
        models.load_checkpoint(small(), str(saved), sha256=sha256)


# Files that are refused


class Canary:
    """Unpickled by a plain loader, creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 0", "pickle 5"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    content = {"state_dict": {**small().state_dict(), "extra": Canary(canary)}}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    assert "refused, nothing in it was run" in refusal(path)
    assert not canary.exists()
    torch.load(path, weights_only=False) if not kind.startswith("pickle") else pickle.loads(path.read_bytes())
    assert canary.exists(), "the canary sings for an unsafe loader, so the test means something"


def test_a_whole_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "module.pt")
    message = refusal(tmp_path / "module.pt")
    assert "torch.nn.modules.container.Sequential" in message
    assert "torch.save(model.state_dict(), path)" in message


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, kind: str) -> None:
    buffer, path = io.BytesIO(), tmp_path / "cut.pt"
    if kind == "safetensors":
        save_file(small().state_dict(), path)
        content = path.read_bytes()
    else:
        torch.save(small().state_dict(), buffer, _use_new_zipfile_serialization=kind == "zip")
        content = buffer.getvalue()
    for length in {1, 5, 9, 100, *range(0, len(content) - 1, len(content) // 25), len(content) - 1} - {0}:
        path.write_bytes(content[:length])
        refusal(path)
    path.write_bytes(content[: len(content) // 2])
    assert "truncated or no checkpoint" in refusal(path)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\x00" * 64, b"<!DOCTYPE html><html>404</html>"])
def test_junk_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "junk.pt").write_bytes(content)
    assert "truncated or no checkpoint" in refusal(tmp_path / "junk.pt")


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.pt")
    (tmp_path / "empty.pt").touch()
    assert "is empty" in refusal(tmp_path / "empty.pt")
    assert "is a folder" in refusal(tmp_path)


def test_hash_mismatch_shows_both_hashes(saved: Path) -> None:
    digest = hashlib.sha256(saved.read_bytes()).hexdigest()
    message = refusal(saved, sha256="0" * 64)
    assert digest in message
    assert "0" * 64 in message


@pytest.mark.parametrize("sha256", ["", "12fca8", "not hexadecimal", "0" * 65])
def test_a_hash_that_is_none_is_refused(saved: Path, sha256: str) -> None:
    with pytest.raises(InputError, match="first 8"):
        models.load_checkpoint(small(), saved, sha256=sha256)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(1)], {"state_dict": {"a": 1}}, torch.zeros(1)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert "no state dict" in refusal(tmp_path / "other.pt")


def test_wrong_architecture_names_the_first_keys(saved: Path) -> None:
    message = refusal(saved, models.ResNet8())
    assert "does not fit ResNet8" in message
    assert "missing conv1.weight, bn1.weight, bn1.bias and" in message
    assert "unexpected 0.weight, 0.bias, 1.weight and" in message


def test_another_shape_is_named_with_both_shapes(saved: Path) -> None:
    wider = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    assert "3.weight (3, 16) instead of (10, 16)" in refusal(saved, wider)


def test_integer_codes_do_not_pass_for_weights(tmp_path: Path) -> None:
    weights = small().state_dict()
    weights["0.weight"] = weights["0.weight"].char()
    torch.save(weights, tmp_path / "codes.pt")
    assert "0.weight (4, 1, 3, 3) torch.int8 instead of (4, 1, 3, 3)" in refusal(tmp_path / "codes.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_named(tmp_path: Path, value: float) -> None:
    weights = small().state_dict()
    weights["1.running_var"][2] = value
    torch.save(weights, tmp_path / "nan.pt")
    assert "1.running_var" in refusal(tmp_path / "nan.pt")
    with pytest.raises(NonFiniteError):
        models.load_checkpoint(small(), tmp_path / "nan.pt")


# Fetching


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.hub's cache in a temporary folder; fetching copies the bundled file and records the URL."""
    fetched: list[str] = []

    def fetch(url: str, target: str, hash_prefix: str) -> None:
        fetched.append(url)
        shutil.copy(ASSETS / "digits_resnet8.safetensors", target)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    return fetched


def test_a_url_is_fetched_once_and_its_hash_checked(hub: list[str]) -> None:
    url, sha256 = "https://example.org/model.safetensors", models.info("digits_resnet8").sha256
    for _ in range(2):
        models.load_model("digits_resnet8", checkpoint=url, sha256=sha256)
    assert hub == [url]
    with pytest.raises(InputError, match="expected 00000000"):  # another file of that name, not the cached one
        models.load_model("digits_resnet8", checkpoint=url, sha256="0" * 8)


def test_registered_networks_are_fetched_from_their_url(hub: list[str]) -> None:
    with pytest.raises(InputError, match="expected d509ac18"):
        models.load_model("cifar10_resnet32")
    assert hub == [models.info("cifar10_resnet32").url]


def test_without_a_network_one_line_says_what_to_do(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("name resolution failed")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError, match=r"resnet44-014dd654.th.*name resolution.*checkpoint=<file>"):
        models.load_model("cifar10_resnet44")


def test_a_changed_file_behind_a_url_is_refused(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*_: object, **__: object) -> None:
        raise RuntimeError('invalid hash value (expected "d509ac18", got "00000000")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", changed)
    with pytest.raises(InputError, match=r"d509ac18.*correct sha256="):
        models.load_model("cifar10_resnet32")


def test_a_url_needs_https_and_a_hash(hub: list[str]) -> None:
    with pytest.raises(InputError, match="only https"):
        models.load_model("digits_resnet8", checkpoint="http://example.org/a.pt", sha256="0" * 8)
    with pytest.raises(InputError, match="needs sha256="):
        models.load_model("digits_resnet8", checkpoint="https://example.org/a.pt")
    assert hub == []


def test_a_hash_is_written_in_one_way() -> None:
    assert checkpoints.normalize_sha256(" 12FCA82F ") == "12fca82f"
