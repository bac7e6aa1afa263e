"""What holds for every network: only quantization changes it, and what leaves is exact or refused in one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from torch import nn

import dfqlib
from dfqlib.errors import InputError
from dfqlib.network import convolution, folding
from dfqlib.network.inference import predict
from dfqlib.quantizer import QuantSpec, StepQuantizer, calibrate, coverage, fused, quantize_layers, quantizers
from dfqlib.recipes.base import prepare_teacher

NO_INTEGER_FORM = {
    "between AdaptiveMaxPool2d(output_size=1)", "between Upsample(scale_factor=2.0, mode='nearest')",
    "between Upsample(scale_factor=2.0, mode='bicubic')", "between PixelShuffle(upscale_factor=1)",
    "between ZeroPad2d((0, 1, 0, 1))", "linear_on_pixels", "cosine_head", "opaque_first_block", "convnext",
    "shuffled_halves", "shufflenet",
    "assertion", "difference_of_relus", "sum_with_a_negative_factor",
    "subclass_of_batchnorm", "subclass_that_cannot_be_followed", "batchnorm_with_fixed_buffers", "slope_per_channel",
    "transposed_convolution", "reflected_edges",
    "alexnet",  # pools one pixel to 36
}  # fmt: skip
"""What an integer file cannot hold yet; each is refused by name."""
IN_FLOATING_POINT = {"cosine_head", "convnext", "transposed_convolution", "subclass_that_cannot_be_followed"}
"""Networks of which more than 1 % of the multiply-accumulates stay in floating point."""


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of.*:FutureWarning")
def test_a_network_is_what_it_was_and_leaves_exactly_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model, shape = zoo.make(name)
    images = torch.randn(12, *shape)
    expected = predict(model, images.clone())
    before = {key: value.clone() for key, value in model.state_dict().items()}

    with convolution.guarded():  # as in a recipe
        teacher, classes = prepare_teacher(model, shape, torch.device("cpu"))
    assert classes == 5
    assert close(predict(teacher, images.clone()), expected)
    with convolution.guarded():
        network = quantize_layers(teacher, QuantSpec(weight_bits=6, activation_bits=6, granularity="channel"))
    assert close(predict(network, images.clone()), expected)  # not calibrated: nothing is rounded yet
    assert close(predict(folding.fold(teacher).network, images.clone()), expected)
    assert close(predict(fused(teacher), images.clone()), expected)

    with torch.no_grad():
        calibrate(network, images.clone())
    found = coverage(network, shape)
    assert found.floating_share <= 1 or name in IN_FLOATING_POINT, str(found)
    assert_unsigned_where_nothing_is_negative(network, images)
    rounded = predict(network, images.clone())  # other orders of sums move single codes
    assert (predict(fused(network), images.clone()) - rounded).abs().max() <= 0.05 * (1 + rounded.abs().max())
    path = dfqlib.save_quantized(network, tmp_path / "q.pt")
    assert torch.equal(predict(dfqlib.load_quantized(path, model), images.clone()), predict(network, images.clone()))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])

    file = tmp_path / "net.onnx"
    if name in NO_INTEGER_FORM:
        with pytest.raises(InputError) as refused:
            dfqlib.export_onnx(network, file, shape)
        assert "\n" not in str(refused.value)
        assert not file.exists()
        return
    dfqlib.export_onnx(network, file, shape)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    simulation = dfqlib.export.integer_network(network, shape)
    logits = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(logits, predict(simulation, images.clone()).numpy(), rtol=1e-5, atol=1e-5)


def assert_unsigned_where_nothing_is_negative(network: nn.Module, images: torch.Tensor) -> None:
    least: dict[str, float] = {}
    handles = [
        quantizer.register_forward_pre_hook(lambda _, args, name=name: least.update({name: float(args[0].min())}))
        for name, quantizer in quantizers(network)
        if isinstance(quantizer, StepQuantizer) and not name.endswith("weight_quantizer")
    ]
    predict(network, images.clone())
    for handle in handles:
        handle.remove()
    for name, quantizer in quantizers(network):
        if name in least and isinstance(quantizer, StepQuantizer):
            assert quantizer.signed or least[name] >= 0, name


def test_what_stays_in_floating_point_is_said() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 5)
            self.mix = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.mix(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

    with pytest.warns(UserWarning, match=r"floating point: mix\."):
        report = dfqlib.quantize(Attention(), zoo.SHAPE, recipe="equalize", progress=False)
    assert "in floating point: mix." in report.summary()
    assert 50 < report.coverage().floating_share < 100


@pytest.mark.hours
@pytest.mark.parametrize("name", zoo.full_width())
def test_networks_of_torchvision_are_quantized_or_what_is_not_is_named(name: str) -> None:
    model, shape = zoo.make_full_width(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = dfqlib.quantize(model, shape, recipe="equalize", progress=False)
    found = report.coverage()
    if found.floating_share > 1:
        named = [str(warning.message) for warning in caught if "in floating point: " in str(warning.message)]
        assert named, str(found)
        assert next(iter(found.floating)) in named[0]
    assert bool(predict(report.model, torch.randn(2, *shape)).isfinite().all())


def test_a_model_with_computed_weights_is_left_as_it_is() -> None:
    model, shape = zoo.make("weight_norm")
    images = torch.randn(2, *shape)
    before = predict(model, images)
    dfqlib.quantize(model, shape, recipe="equalize", progress=False)
    assert torch.equal(predict(model, images), before)
    assert nn.utils.parametrize.is_parametrized(model[1])
