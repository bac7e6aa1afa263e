"""The library gives the figures that the methods' released code gave for the same inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dfqlib.models
from dfqlib import clipping, losses, quantizer
from dfqlib.batchnorm import BatchNormProbe

CLIP_BITS = (3, 4, 6, 8)
CLIP_DATA = ("gauss", "laplace", "outlier", "relu")


@pytest.fixture(scope="module")
def arrays(reference: Path) -> dict[str, Tensor]:
    with np.load(reference / "official.npz") as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


@pytest.fixture(scope="module")
def scalars(reference: Path) -> dict[str, float]:
    return json.loads((reference / "official.json").read_text())


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_affine_per_tensor(arrays: dict[str, Tensor], bits: int) -> None:
    x = arrays["affine_x"]
    quantized = quantizer.affine_quantize(x, x.min(), x.max(), bits)
    torch.testing.assert_close(quantized, arrays[f"affine_q{bits}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_affine_per_output_channel(arrays: dict[str, Tensor], bits: int) -> None:
    w = arrays["w"]
    rows = w.flatten(1)
    quantized = quantizer.affine_quantize(w, rows.amin(1), rows.amax(1), bits)
    torch.testing.assert_close(quantized, arrays[f"w_pc{bits}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sign", ["s", "u"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_learned_step_and_its_gradients(
    arrays: dict[str, Tensor], scalars: dict[str, float], bits: int, sign: str
) -> None:
    qmin, qmax = quantizer.integer_range(bits, signed=sign == "s")
    x = arrays["lsq_x"].clone().requires_grad_()
    clip = torch.tensor(1.7, requires_grad=True)
    quantized = quantizer.fake_quantize(x, clip / qmax, qmin, qmax)
    (quantized * torch.linspace(-1, 1, 400)).sum().backward()
    key = f"lsq_k{bits}_{sign}"
    torch.testing.assert_close(quantized.detach(), arrays[key], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(x.grad, arrays[f"{key}_gx"], rtol=1e-4, atol=1e-6)
    assert clip.grad is not None
    assert clip.grad.item() == pytest.approx(scalars[f"{key}_gclip"], rel=1e-4)


@pytest.mark.parametrize("bits", CLIP_BITS)
@pytest.mark.parametrize("data", CLIP_DATA)
def test_clip_thresholds(arrays: dict[str, Tensor], scalars: dict[str, float], data: str, bits: int) -> None:
    x, signed = arrays[f"clip_{data}"], data != "relu"
    found = {method: clipping.threshold(x, bits, method, signed) for method in clipping.METHODS}
    expected = {method: scalars[f"clip_{data}_{bits}_{method}"] for method in clipping.METHODS}
    assert found["max"] == expected["max"]
    assert found["aciq"] == pytest.approx(expected["aciq"], rel=0.01)
    for method in ("mse", "kl"):
        assert _error(x, found[method], bits, signed) <= 1.02 * scalars[f"clip_{data}_{bits}_{method}_err"]


@pytest.mark.parametrize("method", clipping.METHODS)
@pytest.mark.parametrize("data", CLIP_DATA)
def test_error_of_a_threshold(arrays: dict[str, Tensor], scalars: dict[str, float], data: str, method: str) -> None:
    for bits in CLIP_BITS:
        clip = scalars[f"clip_{data}_{bits}_{method}"]
        error = float(clipping.quantization_error(arrays[f"clip_{data}"], clip, bits, signed=data != "relu"))
        assert error == pytest.approx(scalars[f"clip_{data}_{bits}_{method}_err"], rel=1e-4)


def _error(x: Tensor, clip: float, bits: int, signed: bool) -> float:
    """Measured with the quantizer that the network will have."""
    qmin, qmax = quantizer.integer_range(bits, signed)
    return (quantizer.fake_quantize(x, clip / qmax, qmin, qmax) - x).square().mean().item()


@pytest.mark.parametrize("alpha", [1, 40])
def test_inception_score(arrays: dict[str, Tensor], scalars: dict[str, float], alpha: int) -> None:
    loss = losses.inception_score_loss(arrays["logits_t"], alpha).item()
    assert loss == pytest.approx(scalars[f"is_{alpha}"], abs=1e-4)
    assert loss == pytest.approx(scalars[f"is_paper_{alpha}"], abs=1e-4)


def test_distillation(arrays: dict[str, Tensor], scalars: dict[str, float]) -> None:
    loss = losses.distillation_loss(arrays["logits_s"], arrays["logits_t"], temperature=1)
    assert loss.item() == pytest.approx(scalars["kd_T1"], abs=1e-5)


def test_statistics_terms_through_resnet20(
    arrays: dict[str, Tensor], scalars: dict[str, float], shared_data: Path
) -> None:
    checkpoint = shared_data / "models" / "resnet20-12fca82f.th"
    model = dfqlib.models.load_model("cifar10_resnet20", checkpoint=checkpoint)
    images = arrays["images"]
    with torch.no_grad(), BatchNormProbe(model) as probe:
        logits = model(images)
        found = {
            "bn_dfqf": losses.bn_divergence_loss(probe),
            "bns_gdfq_paper_sum_squares": losses.bn_l2_loss(probe, "paper"),
            "bns_gdfq_code_mean_over_layers": losses.bn_l2_loss(probe, "released"),
            "zeroq": losses.zeroq_loss(probe, images),
        }
    torch.testing.assert_close(logits, arrays["teacher_logits"], rtol=1e-3, atol=1e-4)
    for key, loss in found.items():
        assert loss.item() == pytest.approx(scalars[key], rel=1e-3), key
