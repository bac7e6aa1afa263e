"""AdaRound rounds up or down so that a layer's output stays, which rounding to nearest does not aim at."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfqlib.errors import InputError
from dfqlib.models import CifarResNet
from dfqlib.network.folding import fold
from dfqlib.posttraining.rounding import (
    adaround,
    annealed_beta,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_regularizer,
    soft_weights,
)
from dfqlib.quantizer import QuantSpec, calibrate, quantize_layers, quantizers
from dfqlib.training import Session


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU6(), nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).eval()  # fmt: skip


def quantized(model: nn.Module, bits: int = 3, **options: Any) -> tuple[Any, Any, Tensor]:
    """The student, its folded teacher, and correlated images: what rounding to nearest knows nothing of."""
    folded = fold(model)
    images = torch.randn(64, 3, 1, 1) + 0.3 * torch.randn(64, 3, 8, 8)
    student = quantize_layers(folded.network, QuantSpec(bits, 8, bits, step="fixed", **options))
    calibrate(student, images)
    return student, folded.network, images


def test_the_rectified_sigmoid_by_hand() -> None:
    h = rectified_sigmoid(torch.tensor([0.0, 20.0, -20.0, 1.0]))
    assert h.tolist() == pytest.approx([0.5, 1.0, 0.0, 0.7310586 * 1.2 - 0.1])
    share = torch.linspace(0, 0.999, 20)
    assert torch.allclose(rectified_sigmoid(inverse_rectified_sigmoid(share)), share, atol=1e-5)


def test_the_regularizer_vanishes_where_every_weight_is_decided() -> None:
    assert float(rounding_regularizer(torch.tensor([9.0, -9.0]), 2.0)) == 0.0
    assert float(rounding_regularizer(torch.zeros(3), 2.0)) == 3.0
    v = inverse_rectified_sigmoid(torch.tensor([0.75]))
    assert float(rounding_regularizer(v, 2.0)) == pytest.approx(0.75)  # 1 - |2 * 0.75 - 1|^2
    assert float(rounding_regularizer(v, 20.0)) == pytest.approx(1 - 0.5**20)


def test_beta_falls_from_20_to_2_after_the_warm_up() -> None:
    assert [annealed_beta(share) for share in (0.0, 0.2, 0.6, 1.0)] == pytest.approx([20.0, 20.0, 11.0, 2.0])


def test_soft_weights_start_where_the_weights_are_and_end_on_the_grid() -> None:
    weight, step = torch.tensor([0.26, -0.11, 5.0]), torch.tensor(0.1)
    v = inverse_rectified_sigmoid(weight / step - (weight / step).floor())
    assert torch.allclose(soft_weights(weight, v, step, -8, 7), torch.tensor([0.26, -0.11, 0.7]), atol=1e-6)
    decided = soft_weights(weight, torch.tensor([-9.0, 9.0, 9.0]), step, -8, 7)
    assert torch.allclose(decided, torch.tensor([0.2, -0.1, 0.7]))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_adaround_reconstructs_better_than_rounding_to_nearest(granularity: Any) -> None:
    student, teacher, images = quantized(small(), granularity=granularity)
    with torch.no_grad():
        before = float((student(images) - teacher(images)).square().mean())
    errors = adaround(student, teacher, images, steps=300, batch=32)
    assert errors.keys() == {"0", "3", "6"}
    assert all(chosen < 0.9 * nearest for nearest, chosen in errors.values())
    with torch.no_grad():
        assert float((student(images) - teacher(images)).square().mean()) < 0.7 * before


def test_weights_go_up_or_down_and_never_further() -> None:
    student, teacher, images = quantized(small(), bits=4)
    adaround(student, teacher, images, steps=100)
    for name, quantizer in quantizers(student):
        if not name.endswith("weight_quantizer"):
            continue
        layer = name.removesuffix(".weight_quantizer")
        chosen, original = (network.get_submodule(layer).weight.detach() for network in (student, teacher))
        assert torch.allclose(quantizer(chosen), chosen, atol=1e-6)  # on the grid: quantizing again changes nothing
        clipped = original.clamp(quantizer.qmin * quantizer.step, quantizer.qmax * quantizer.step)
        assert float(((chosen - clipped) / quantizer.step).abs().max()) < 1.001


def test_a_residual_network_and_a_session_with_history() -> None:
    model = CifarResNet(8).eval()
    student, teacher, images = quantized(model)
    session = Session(seed=1, progress=False)
    errors = adaround(student, teacher, images[:16], steps=20, batch=8, session=session)
    assert sum(chosen for _, chosen in errors.values()) <= sum(nearest for nearest, _ in errors.values())
    assert {row["phase"] for row in session.history} == {f"rounding {name}" for name in errors}


def test_without_a_session_the_random_state_stays_and_runs_repeat() -> None:
    model = small()
    first, teacher, images = quantized(model)
    state = torch.get_rng_state()
    adaround(first, teacher, images, steps=20)
    assert torch.equal(state, torch.get_rng_state())
    second = quantize_layers(teacher, first.meta["spec"])
    calibrate(second, images)
    adaround(second, teacher, images, steps=20)
    weights = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_what_adaround_cannot_work_on_is_said() -> None:
    student, teacher, images = quantized(small())
    with pytest.raises(InputError, match="images is empty"):
        adaround(student, teacher, images[:0])
    student, teacher, images = quantized(small(), scheme="affine")
    with pytest.raises(InputError, match='0: AdaRound needs a step per weight; quantize with QuantSpec\\(scheme="symm'):
        adaround(student, teacher, images)
