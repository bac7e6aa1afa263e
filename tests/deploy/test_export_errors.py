"""What an export cannot work with is named, with the remedy, in one line; no file is left."""

import errno
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exported import Mobile, Residual, quantized
from torch import Tensor, nn

from dfqlib.deploy.onnx import export_onnx
from dfqlib.deploy.onnx.verify import load, verify_export
from dfqlib.errors import InputError
from dfqlib.quantizer import QuantSpec, quantize_layers, quantizers


class BatchMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).reshape(-1, 4)).reshape(-1, 2)


class Difference(Mobile):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x - self.linear(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.head = nn.Conv2d(3, 4, 1), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.conv(x).flatten(2))[0].mean(1))


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 4, 1), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        return self.head(self.attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize(("build", "left"), [(Recurrent, "lstm"), (Attentive, "attention")])
def test_what_stays_in_floating_point_is_listed_and_the_rest_is_quantized(build: Any, left: str) -> None:
    network = quantized(build().eval(), (3, 4, 4))
    listed = network.meta["unquantized"]
    assert left in listed  # type: ignore[operator]
    assert all(name.startswith(left) for name in listed)  # type: ignore[union-attr]
    assert {"conv.weight_quantizer", "head.weight_quantizer"} <= {name for name, _ in quantizers(network)}


def small(**options: Any) -> nn.Module:
    return quantized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 2)), (3, 4, 4), **options)


def not_finite() -> nn.Module:
    network = small()
    network.get_parameter("2.weight").data[0, 0] = float("nan")
    return network


def uncalibrated() -> nn.Module:
    return quantize_layers(Residual(), QuantSpec())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "model=Linear has no quantizers; give what dfqlib.quantize returned"),
        (lambda: 3, "model=int is no network"),
        (uncalibrated, "is not calibrated; call quantizer.calibrate"),
        (lambda: small(scheme="affine"), 'is affine.*QuantSpec\\(scheme="symmetric"\\)'),
        (lambda: small(bits="w16a16", edge_bits=16), "has 16 bits, but integer files carry at most 8"),
        (lambda: small().half(), "is torch.float16, not float32; quantize and export model.float"),
        (not_finite, "2.weight holds NaN or infinite values; quantize a sound checkpoint"),
        (lambda: quantized(BatchMixing(), (3, 4, 4)), "keep the batch as its first dimension"),
        (lambda: quantized(Difference().eval(), (3, 4, 4)), r"sub \(sub\) has no integer form"),
        (lambda: quantized(Recurrent().eval(), (3, 4, 4)), r"lstm \(LSTM\) has no integer form"),
        (lambda: quantized(Attentive().eval(), (3, 4, 4)), "has no integer form; replace it by convolutions"),
        (
            lambda: quantized(
                nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(64, 2)),
                (3, 4, 4),
            ),
            "0: padding_mode='reflect' has no integer form; use zeros",
        ),
    ],
)
def test_what_has_no_integer_form_is_named_and_leaves_no_file(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        export_onnx(make(), tmp_path / "net.onnx", (3, 4, 4))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = small()
    bad: list[tuple[Any, Any, Any, str]] = [
        (tmp_path / "net.onnx", (3, 4, 4), "int2", 'container=\'int2\' must be "int8" or "int4"'),
        (tmp_path, (3, 4, 4), "int8", "is a folder"),
        (tmp_path / "no" / "net.onnx", (3, 4, 4), "int8", "does not exist; create it first"),
        (tmp_path / "net.onnx", (3, 4), "int8", "image_shape=\\(3, 4\\) must be"),
        (tmp_path / "net.onnx", (3, 9, 9), "int8", "cannot take images of image_shape=\\(3, 9, 9\\)"),
    ]
    for path, shape, container, message in bad:
        with pytest.raises(InputError, match=message):
            export_onnx(network, path, shape, container)

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match='pip install "dfqlib\\[export\\]"'):
        export_onnx(network, tmp_path / "net.onnx", (3, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as half:
            half.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    path = tmp_path / "net.onnx"
    for before in ([], [path]):
        for each in before:
            each.write_text("an earlier export")
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); name another place"):
            export_onnx(small(), path, (3, 4, 4))
        assert list(tmp_path.iterdir()) == before
    assert path.read_text() == "an earlier export"


def test_a_folder_without_permission_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(InputError, match=r"net.onnx cannot be written \(Permission denied\); name another place"):
        export_onnx(uncalibrated(), tmp_path / "net.onnx", (3, 4, 4))


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    network, images = small(), torch.randn(3, 3, 4, 4)
    with pytest.raises(InputError, match="does not exist; write it with"):
        verify_export(network, tmp_path / "net.onnx", images)
    (tmp_path / "net.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="cannot load it"):
        verify_export(network, tmp_path / "net.onnx", images)
    export_onnx(quantized(Residual().eval(), (3, 8, 8)), tmp_path / "net.onnx", (3, 8, 8))
    with pytest.raises(InputError, match="give the file of this network"):
        verify_export(network, tmp_path / "net.onnx", images)
    with pytest.raises(InputError, match="must be \\(N, channels, height, width\\)"):
        verify_export(network, tmp_path / "net.onnx", images, torch.zeros(2))
    with pytest.raises(InputError, match=r"images are torch.float16, and the file takes float32; give normalized"):
        verify_export(network, tmp_path / "net.onnx", images.half())
    newer = onnx.load(tmp_path / "net.onnx")
    newer.opset_import[0].version = 99
    (tmp_path / "net.onnx").write_bytes(newer.SerializeToString())
    with pytest.raises(InputError, match="update onnxruntime, or export it again for an older one with container"):
        load(tmp_path / "net.onnx")
