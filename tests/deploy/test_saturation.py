"""An exported file computes the same on every processor: no two products of it can leave 16 bits."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import saturating
import torch
from exported import (
    NETWORKS,
    Mobile,
    Residual,
    Shape,
    from_torchvision,
    logits_of_file,
    odd_batch_norms,
    quantized,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dfqlib
from dfqlib.deploy import integer
from dfqlib.deploy.integer.layer import IntegerLayer
from dfqlib.deploy.onnx import Container, export_onnx, integer_network
from dfqlib.deploy.onnx.verify import load, verify_export
from dfqlib.network.inference import predict
from dfqlib.quantizer import QuantConv2d, QuantSpec, StepQuantizer, calibrate, quantize_layers
from dfqlib.spec import Granularity

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = ("w8a8", "w4a4", "w3a3", "w2a2")
GRANULARITIES = get_args(Granularity)


def check_file(network: nn.Module, shape: Shape, images: Tensor, path: Path, *, everywhere: bool = True) -> None:
    """No two products of it can saturate, and on a processor where pairs do the logits are those of the simulation."""
    expected = predict(integer_network(network, shape), images)
    for container in get_args(Container):
        export_onnx(network, path, shape, container)
        assert saturating.saturable(path) == {}
        assert torch.equal(logits_of_file(path, images)[0], expected)
        assert np.array_equal(saturating.run(path, images, everywhere=everywhere), expected.numpy())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", [*NETWORKS, "mobile"])
def test_no_two_products_of_a_file_can_saturate(name: str, bits: str, granularity: str, tmp_path: Path) -> None:
    build, shape = {**NETWORKS, "mobile": (Mobile, (3, 8, 8))}[name]
    network = quantized(odd_batch_norms(build()), shape, bits, granularity=granularity)
    check_file(network, shape, torch.randn(20, *shape), tmp_path / "net.onnx")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_nor_can_those_of_networks_of_torchvision(name: str, bits: str, granularity: str, tmp_path: Path) -> None:
    model, shape = from_torchvision(name)
    network = quantized(model, shape, bits, granularity=granularity)
    images = torch.randn(2, *shape)
    integer.prepare(network, images)
    check_file(network, shape, images, tmp_path / "net.onnx", everywhere=False)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_nor_can_those_of_the_digits(bits: str, granularity: str, tmp_path: Path) -> None:
    teacher = dfqlib.load_model("digits_resnet8")
    images, _ = dfqlib.data.images_and_labels(dfqlib.load_data("digits"), limit=50)
    network = quantize_layers(teacher, QuantSpec.parse(bits, granularity=granularity))
    calibrate(network, images)
    integer.prepare(network, images)
    check_file(network, (1, 16, 16), images, tmp_path / "net.onnx")


@pytest.mark.parametrize("bits", WIDTHS)
def test_nor_can_those_of_resnet20_on_real_images(bits: str, shared_data: Path, tmp_path: Path) -> None:
    known = dfqlib.models.info("cifar10_resnet20")
    teacher = dfqlib.load_model(known.name, checkpoint=shared_data / "models/resnet20-12fca82f.th")
    folder = dfqlib.image_folder(shared_data / "cifar10/test", known.mean, known.std)
    images, _ = dfqlib.data.images_and_labels(folder, limit=64)
    network = quantize_layers(teacher, QuantSpec.parse(bits, granularity="channel"))
    calibrate(network, images[:32], "max")
    integer.prepare(network, images[:32])
    check_file(network, known.image_shape, images, tmp_path / "net.onnx", everywhere=False)


def digits_with_8_bits_everywhere(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[Any, Tensor]:
    """The file that was written before channels got 7 bits, the network it is of, and images."""
    images, _ = dfqlib.data.images_and_labels(dfqlib.load_data("digits"), limit=100)
    network = quantize_layers(dfqlib.load_model("digits_resnet8"), QuantSpec.parse("w4a4", granularity="channel"))
    calibrate(network, images, "max")
    integer.prepare(network, images)
    monkeypatch.setattr(IntegerLayer, "_can_saturate", False)
    export_onnx(network, path, (1, 16, 16))
    return network, images


def test_codes_of_8_bits_did_saturate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network, images = digits_with_8_bits_everywhere(monkeypatch, tmp_path / "net.onnx")
    assert saturating.saturable(tmp_path / "net.onnx") == {"conv1/sum": 12, "logits": 10}
    exact = predict(integer.simulate(network), images).numpy()
    found = saturating.run(tmp_path / "net.onnx", images)
    assert np.abs(found - exact).max() > 1
    assert np.array_equal(found, saturating.run(tmp_path / "net.onnx", images, everywhere=True))
    check = verify_export(network, tmp_path / "net.onnx", images)
    assert (check.exact_agreement, check.exact_largest_difference) == (100, 0)


def saturates_here() -> bool:
    """Whether ONNX Runtime's kernels do on this machine: x86 without VNNI."""
    helper, kinds = onnx.helper, onnx.TensorProto
    weight = onnx.numpy_helper.from_array(np.full((64, 4), 127, np.int8), "w")
    ends = [
        helper.make_tensor_value_info("x", kinds.UINT8, [1, 64]),
        helper.make_tensor_value_info("y", kinds.INT32, [1, 4]),
    ]
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return int(session.run(None, {"x": np.full((1, 64), 255, np.uint8)})[0][0, 0]) != 255 * 127 * 64


def test_the_model_is_what_such_processors_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not saturates_here():
        pytest.skip("this processor's 8-bit kernels are exact: it has VNNI, or is no x86")
    network, images = digits_with_8_bits_everywhere(monkeypatch, tmp_path / "net.onnx")
    found = saturating.run(tmp_path / "net.onnx", images)
    assert np.array_equal(found, logits_of_file(tmp_path / "net.onnx", images)[0].numpy())
    check = verify_export(network, tmp_path / "net.onnx", images)
    assert check.largest_difference > 1
    assert check.exact_largest_difference == 0


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=9), st.integers(1, 255))
def test_the_range_of_pairs_is_that_of_all_pairs(codes: list[int], largest: int) -> None:
    least, most = saturating.Product(np.array([codes]), largest).pair_range()
    pairs = itertools.combinations([*codes, 0, 0], 2)  # an odd one is paired with nothing
    sums = [a * x + b * y for a, b in pairs for x in (0, largest) for y in (0, largest)]
    assert (least.item(), most.item()) == (min(sums), max(sums))


def integer_layer(weight: Tensor, bits: int, source: StepQuantizer, norm: nn.BatchNorm2d | None = None) -> IntegerLayer:
    """A convolution of one pixel with these weights (channels, inputs), in steps of 1."""
    conv = nn.Conv2d(weight.shape[1], len(weight), 1)
    conv.__class__ = QuantConv2d
    conv.weight_quantizer = StepQuantizer(bits, signed=True)
    conv.weight_quantizer.mode = "quantize"
    conv.weight.data = weight[:, :, None, None].clone()
    return IntegerLayer("conv", conv, norm, source, None)  # type: ignore[arg-type]


CARRIED = StepQuantizer(8, signed=True)
"""Inputs of 8 bits with sign, of which the largest is carried as 255."""


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), st.booleans(), st.integers(1, 6), st.integers(0, 10**6))
def test_no_codes_of_a_layer_can_saturate(bits: int, source_bits: int, signed: bool, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, inputs, generator=generator) * 2 ** (bits - 2)
    norm = nn.BatchNorm2d(8).eval()
    norm.weight.data = torch.randn(8, generator=generator) * torch.tensor([1.0, 1, 1, 1, 1e-3, 1e-9, 1e-9, 0])
    norm.bias.data = torch.randn(8, generator=generator)
    source = StepQuantizer(source_bits, signed=signed)
    for each in (norm, None):
        layer = integer_layer(weight, bits, source, each)
        codes = layer.integers()[0].flatten(1).detach().numpy().astype(np.int64)
        largest = source.qmax + (128 if signed else 0)
        assert not saturating.Product(codes, largest).saturable.any()
        assert bits == 8 or not layer.narrowed.any()


def test_only_channels_that_could_saturate_get_a_grid_twice_as_coarse() -> None:
    weight = torch.tensor([[100.4, 28.0, -90.0], [100.6, 28.0, -90.0], [-127.0, 127.0, 0.0], [-64.4, -64.6, 65.0]])
    layer = integer_layer(weight, 8, CARRIED)
    assert layer.narrowed.tolist() == [False, True, False, True]
    codes, _, steps = layer.integers()
    assert codes.flatten(1).tolist() == [[100, 28, -90], [50, 14, -45], [-127, 127, 0], [-32, -32, 32]]
    assert steps.tolist() == [1, 2, 1, 2]
    unsigned = StepQuantizer(4, signed=False)  # at most 15: even 8-bit weights fit
    assert not integer_layer(weight, 8, unsigned).narrowed.any()


@pytest.mark.parametrize("bits", range(2, 8))
def test_weights_of_7_bits_and_fewer_stay_what_training_made_of_them(bits: int) -> None:
    weight = torch.randn(16, 20) * 2 ** (bits - 2)
    layer = integer_layer(weight, bits, CARRIED)
    codes, _, steps = layer.integers()
    assert torch.equal(codes.flatten(1), layer.layer.weight_quantizer(layer.layer.weight).flatten(1))  # type: ignore[union-attr,operator]
    assert (steps == 1).all()


def test_7_bits_are_rounded_once_and_from_the_weights_themselves() -> None:
    weight = torch.randn(16, 200) * 40
    layer = integer_layer(weight, 8, CARRIED)
    codes, _, steps = layer.integers()
    assert layer.narrowed.all()
    inside = weight.abs() <= 126
    assert ((codes.flatten(1) * steps[:, None] - weight).abs()[inside] <= 1).all()
    assert codes.abs().max() <= 63


def test_the_gradient_is_that_of_8_bits() -> None:
    weight, slope = torch.randn(8, 30) * 60, torch.randn(8, 30, 1, 1)
    found = []
    for as_integers in (True, False):
        layer = integer_layer(weight, 8, CARRIED)
        conv: Any = layer.layer
        codes, _, steps = layer.integers()
        assert layer.narrowed.all()
        values = codes * steps.view(-1, 1, 1, 1) if as_integers else conv.weight_quantizer(conv.weight)
        (values * slope).sum().backward()
        found.append((conv.weight.grad, conv.weight_quantizer.step.grad, values.detach()))
    (weights, step, seven), (expected, expected_step, eight) = found
    assert torch.equal(weights, expected)
    assert (weights == 0).any()  # beyond 8 bits
    stretched = expected_step + ((seven - eight) * slope).sum()  # a step stretches the values that there are
    torch.testing.assert_close(step, stretched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", [*NETWORKS, "mobile"])
def test_a_settled_network_has_even_codes_and_settles_to_itself(name: str, granularity: str) -> None:
    build, shape = {**NETWORKS, "mobile": (Mobile, (3, 8, 8))}[name]
    network = quantized(odd_batch_norms(build()), shape, "w8a8", granularity=granularity)
    integer.prepare(network, torch.randn(32, *shape))
    narrow = {layer.name: layer.narrowed for layer in integer_layers(network)}
    assert integer.narrowed(network) == {each: int(found.sum()) for each, found in narrow.items() if found.any()}
    images = torch.randn(64, *shape)
    expected = predict(integer.simulate(network), images)
    integer.settle(network)
    torch.testing.assert_close(predict(integer.simulate(network), images), expected)
    once = copy.deepcopy(network.state_dict())
    for layer in integer_layers(network):
        conv: Any = layer.layer
        if conv is not None and narrow[layer.name].any():
            step = conv.weight_quantizer.step.view(-1, *[1] * (conv.weight.ndim - 1))
            codes = (conv.weight_quantizer(conv.weight) / step).round()[narrow[layer.name]]
            assert (codes % 2 == 0).all()
    integer.settle(network)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, once[key], rtol=1e-6, atol=1e-6)


def integer_layers(network: nn.Module) -> list[IntegerLayer]:
    return [layer for layer in integer.simulate(network).modules() if isinstance(layer, IntegerLayer)]


def test_the_check_runs_the_file_with_default_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network, opened = quantized(Residual().eval(), (3, 8, 8)), []
    path = export_onnx(network, tmp_path / "net.onnx", (3, 8, 8))
    create = onnxruntime.InferenceSession

    def recorded(source: Any, options: Any, **others: Any) -> Any:
        try:
            opened.append(options.get_session_config_entry("session.x64quantprecision"))
        except RuntimeError:  # it has none
            opened.append("")
        return create(source, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    load(path)
    assert set(opened) == {""}
    load(path, exact=True)
    assert opened[-1] == "1"


def test_on_record_all_kernels_reach_the_same_accuracy() -> None:
    rows = json.loads((ROOT / "results" / "export.json").read_text())["rows"]
    assert {(row["job"]["bits"], row["job"]["seed"]) for row in rows} == set(itertools.product(WIDTHS[:3], range(3)))
    for row in rows:
        for container in {"int8", "int4"} & set(row):
            found = row[container]
            assert found["saturable_channels"] == 0
            assert found["largest_logit_difference"] == found["exact_logit_difference"] == 0
            assert abs(found["file_top1"] - found["exact_top1"]) <= 0.2
            assert abs(found["file_top1"] - row["saturating_top1"]) <= 0.2
        assert any(name in row["device"] for name in ("AVX", "NEON"))
