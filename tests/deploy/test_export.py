"""Facts about integer networks: the file computes what the simulation computes, code by code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from exported import NETWORKS, Mobile, Residual, from_torchvision, logits_of_file, odd_batch_norms, quantized
from torch import nn
from torch.nn import functional as F

import dfqlib
from dfqlib.__main__ import main
from dfqlib.deploy import integer
from dfqlib.deploy.integer.layer import IntegerLayer
from dfqlib.deploy.onnx import Container, export_onnx, integer_network
from dfqlib.deploy.onnx.verify import FLOAT_TORCH, float_network, verify_export
from dfqlib.models.resnet import CifarResNet
from dfqlib.network.inference import predict
from dfqlib.quantizer import QuantSpec, StepQuantizer, calibrate, quantize_layers, quantizers


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("bits", "granularity", "container"),
    [("w8a8", "tensor", "int8"), ("w4a4", "channel", "int4"), ("w3a3", "tensor", "int4"), ("w2a2", "channel", "int8")],
)
def test_every_logit_of_the_file_is_that_of_the_simulation(
    name: str, bits: str, granularity: str, container: Any, tmp_path: Path
) -> None:
    build, shape = NETWORKS[name]
    network = quantized(odd_batch_norms(build()), shape, bits, granularity=granularity)
    path = export_onnx(network, tmp_path / "net.onnx", shape, container)
    images = torch.randn(50, *shape)
    found, operations = logits_of_file(path, images)
    assert torch.equal(found, predict(integer_network(network, shape), images))
    assert not {"Conv", "Gemm", "MatMul", "FusedConv", "Sigmoid"} & set(operations)
    assert operations.get("QGemm", 0) == sum(isinstance(module, nn.Linear) for module in network.modules())
    assert found.std() > 0


def test_depthwise_layers_and_relu6_run_in_integers(tmp_path: Path) -> None:
    network = quantized(odd_batch_norms(Mobile()), (3, 8, 8), "w8a8")
    images = torch.randn(50, 3, 8, 8) * 3
    found, operations = logits_of_file(export_onnx(network, tmp_path / "net.onnx", (3, 8, 8)), images)
    assert torch.equal(found, predict(integer_network(network, (3, 8, 8)), images))
    assert operations["QLinearConv"] == 3
    torch.testing.assert_close(found, predict(network, images), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("bits", "granularity"), [("w8a8", "channel"), ("w4a4", "tensor"), ("w3a3", "channel")])
def test_linear_layers_are_one_kernel_each_and_the_last_one_ends_in_floats(
    bits: str, granularity: str, tmp_path: Path
) -> None:
    shape, images = (1, 16, 16), torch.randn(20, 1, 16, 16)
    layers = [nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 10, bias=False)]  # the last reads signs
    network = quantized(nn.Sequential(nn.Flatten(), *layers).eval(), shape, bits, granularity=granularity)
    expected = predict(integer_network(network, shape), images)
    for container in get_args(Container):
        path = export_onnx(network, tmp_path / "net.onnx", shape, container)
        found, operations = logits_of_file(path, images)
        assert torch.equal(found, expected)
        assert torch.equal(logits_of_file(path, images[:1])[0], expected[:1])  # a kernel of its own for one row
        assert operations["QGemm"] == 3
        assert set(operations) <= {"QGemm", "QuantizeLinear", "Flatten", "Clip"}


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 20), ("mobilenet_v2", 52)])
def test_networks_of_torchvision_leave_as_they_come(name: str, layers: int, tmp_path: Path) -> None:
    model, shape = from_torchvision(name)
    network = quantized(model, shape, granularity="channel")
    images = torch.randn(4, *shape)
    integer.prepare(network, images)
    found, operations = logits_of_file(export_onnx(network, tmp_path / "net.onnx", shape, "int4"), images)
    assert torch.equal(found, predict(integer_network(network, shape), images))
    assert found.std() > 0.01
    assert (operations["QLinearConv"], operations["QGemm"]) == (layers, 1)
    assert network.meta["unquantized"] == []  # type: ignore[operator,index]


def test_each_layer_may_have_its_width(tmp_path: Path) -> None:
    widths = {"default": "w4a4", "conv": 8, "other": 3, "head": 2}
    network = quantize_layers(odd_batch_norms(Residual()), QuantSpec.parse(widths))
    images = torch.randn(32, 3, 8, 8)
    calibrate(network, images, "max")
    path = export_onnx(network, tmp_path / "net.onnx", (3, 8, 8), "int4")
    assert torch.equal(logits_of_file(path, images)[0], predict(integer_network(network, (3, 8, 8)), images))
    kinds = {each.name: each.data_type for each in onnx.load(path).graph.initializer if each.name.endswith("/weight")}
    packed = {name.removesuffix("/weight") for name, kind in kinds.items() if kind == onnx.TensorProto.INT4}
    assert packed == {"other", "head"}  # the first layer has the 8 bits of the edges


def test_how_tensors_lie_in_memory_does_not_matter(tmp_path: Path) -> None:
    network = quantized(Residual().eval(), (3, 8, 8))
    images = torch.randn(8, 8, 3, 20).permute(3, 2, 0, 1)
    expected = predict(integer_network(network, (3, 8, 8)), images)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = network.get_parameter("head.weight")
    head.data = head.data.T.contiguous().T
    assert not any(each.is_contiguous() for each in (images, head, network.get_parameter("stem.weight")))
    check = verify_export(network, export_onnx(network, tmp_path / "net.onnx", (3, 8, 8)), images)
    assert check.largest_difference == 0
    assert torch.equal(logits_of_file(tmp_path / "net.onnx", images.contiguous())[0], expected)


@pytest.mark.parametrize("skip", ["quantized", "float"])
def test_steps_that_are_powers_of_two_lose_nothing(skip: str, tmp_path: Path) -> None:
    network = quantized(Residual().eval(), (3, 8, 8), "w4a4", skip=skip)
    integer.prepare_from_noise(network, (3, 8, 8))
    with torch.no_grad():
        for _, quantizer in quantizers(network):
            assert isinstance(quantizer, StepQuantizer)
            quantizer.step.copy_(2.0 ** quantizer.step.log2().ceil())
    images = torch.randn(200, 3, 8, 8)
    found, _ = logits_of_file(export_onnx(network, tmp_path / "net.onnx", (3, 8, 8)), images)
    assert torch.equal(found, predict(integer_network(network, (3, 8, 8)), images))


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a3"])
def test_digits_leave_as_integers_with_their_accuracy(bits: str, tmp_path: Path) -> None:
    teacher = dfqlib.load_model("digits_resnet8")
    images, labels = dfqlib.data.images_and_labels(dfqlib.load_data("digits"), limit=200)
    network = quantize_layers(teacher, QuantSpec.parse(bits, granularity="channel"))
    calibrate(network, images)
    check = verify_export(network, export_onnx(network, tmp_path / "net.onnx", (1, 16, 16)), images, labels)
    assert check.agreement == 100
    assert check.largest_difference == 0
    assert check.file_top1 == check.simulation_top1
    assert check.file_top1 is not None
    assert check.model_top1 is not None
    assert abs(check.file_top1 - check.model_top1) < (3 if bits == "w3a3" else 1)
    assert check.all_integer
    assert (check.operations["QLinearConv"], check.operations["QGemm"]) == (9, 1)
    assert set(check.milliseconds[FLOAT_TORCH]) == {1, 64}
    assert "100.00 % of 200 images" in str(check)
    assert "every layer runs in integers: yes (9 QLinearConv, 1 QGemm)" in str(check)
    assert (check.exact_agreement, check.exact_largest_difference, check.exact_top1) == (100, 0, check.file_top1)
    assert f"top-1: file {check.file_top1:.2f} %, with exact kernels {check.file_top1:.2f} %" in str(check)
    assert check.model_agreement > (90 if bits == "w3a3" else 98)
    assert f"agreement with the fake-quantized network: {check.model_agreement:.2f} %" in str(check)
    assert check.processor in str(check).splitlines()[-1]


def test_resnet20_on_real_images(shared_data: Path, tmp_path: Path) -> None:
    known = dfqlib.models.info("cifar10_resnet20")
    teacher = dfqlib.load_model(known.name, checkpoint=shared_data / "models/resnet20-12fca82f.th")
    folder = dfqlib.image_folder(shared_data / "cifar10/test", known.mean, known.std)
    images, labels = dfqlib.data.images_and_labels(folder, limit=128)
    for bits in ("w8a8", "w4a4", "w3a3"):
        network = quantize_layers(teacher, QuantSpec.parse(bits, granularity="channel"))
        calibrate(network, images[:32], "max")
        integer.prepare(network, images[:32])
        path = export_onnx(network, tmp_path / "net.onnx", (3, 32, 32))
        assert torch.equal(logits_of_file(path, images)[0], predict(integer_network(network, (3, 32, 32)), images))
        if bits == "w8a8":
            top1 = [
                float((predict(net, images).argmax(1) == labels).float().mean())
                for net in (teacher, integer.simulate(network))
            ]
            assert abs(top1[0] - top1[1]) < 0.04


def test_four_bits_are_a_sixth_of_the_file(tmp_path: Path) -> None:
    network = quantized(odd_batch_norms(CifarResNet(20)), (3, 32, 32))
    small = export_onnx(network, tmp_path / "small.onnx", (3, 32, 32), "int4")
    images = torch.randn(64, 3, 32, 32)
    check = verify_export(network, small, images)
    assert check.float_bytes is not None
    assert check.file_bytes <= check.float_bytes / 6.5
    assert check.operations["QLinearConv"] == 19 + 2  # and the two shortcuts
    assert not {"Slice", "Pad"} & set(check.operations)
    assert check.all_integer
    assert check.speedup(FLOAT_TORCH, 1) > 3  # 9 on a processor with VNNI
    assert check.file_top1 is None


@pytest.mark.parametrize(
    ("pixels", "amounts", "fused"),
    [
        ((slice(None, None, 2), slice(None, None, 3)), (0, 0, 0, 0, 1, 2), True),
        ((slice(None, 6), slice(None, None, 2)), (0, 0, 0, 0, 1, 2), False),
        ((slice(2, None, 2), slice(None, None, 2)), (0, 0, 0, 0, 1, 2), False),
        ((slice(None, None, 2), slice(None, None, 2)), (0, 1, 0, 0, 1, 2), False),
        ((slice(None, None, 2), slice(None, None, 2)), (0, 1), False),
        ((slice(None, None, 2), slice(None, None, 2)), (0, 0, 0, 0, -1, 2), False),
    ],
)
def test_every_second_pixel_with_channels_of_zeros_is_one_kernel(
    pixels: tuple[slice, slice], amounts: tuple[int, ...], fused: bool, tmp_path: Path
) -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 1), nn.LazyLinear(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            return self.head(F.pad(x[(slice(None), slice(None), *pixels)], amounts).flatten(1))

    model = Shortcut().eval()
    model(torch.zeros(1, 3, 8, 8))
    network = quantized(model, (3, 8, 8), edge_bits=4)
    images = torch.randn(50, 3, 8, 8)
    found, operations = logits_of_file(export_onnx(network, tmp_path / "net.onnx", (3, 8, 8)), images)
    assert torch.equal(found, predict(integer_network(network, (3, 8, 8)), images))
    assert (operations["QLinearConv"], operations.get("Slice", 0)) == ((2, 0) if fused else (1, 1))


def test_packed_codes_are_the_codes(tmp_path: Path) -> None:
    network = quantized(odd_batch_norms(Residual()), (3, 8, 8), edge_bits=4)
    model = onnx.load(export_onnx(network, tmp_path / "net.onnx", (3, 8, 8), "int4"))
    stored = {each.name: each for each in model.graph.initializer}
    assert model.opset_import[0].version == 21
    layers = [m for m in integer_network(network, (3, 8, 8)).modules() if isinstance(m, IntegerLayer)]
    assert len(layers) == 4
    for layer in layers:
        found = onnx.numpy_helper.to_array(stored[f"{layer.name}/weight"]).astype(np.int8)
        codes = layer.integers()[0].numpy()
        assert stored[f"{layer.name}/weight"].data_type == onnx.TensorProto.INT4
        assert np.array_equal(found, codes)


def test_a_negative_gain_flips_codes_and_the_most_negative_one_has_no_twin() -> None:
    conv, norm = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)
    model = nn.Sequential(conv, norm, nn.Flatten(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -1.0]))
        conv.weight.copy_(torch.tensor([-8.0, -8.0]).view(2, 1, 1, 1))
    network = quantized(model, (1, 1, 1), edge_bits=4)
    with torch.no_grad():
        network.get_parameter("0.weight_quantizer.step").fill_(1.0)
    layer = next(m for m in integer_network(network, (1, 1, 1)).modules() if isinstance(m, IntegerLayer))
    assert layer.integers()[0].flatten().tolist() == [-8, 7]
    assert (layer.integers()[2] > 0).all()


def test_training_the_simulation_trains_the_network() -> None:
    network = quantized(odd_batch_norms(Residual()), (3, 8, 8))
    integer.prepare(network, torch.randn(16, 3, 8, 8))
    simulation = integer.simulate(network)
    images = torch.randn(8, 3, 8, 8)
    network.zero_grad()
    F.mse_loss(simulation(images), network(images).detach() + 1).backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"conv.weight", "norm.weight", "conv.weight_quantizer.step", "quantize_relu.step"} <= moved
    assert any(name.startswith("store_") for name in moved)


def test_gradients_of_the_simulation_follow_those_of_fake_quantization() -> None:
    network = quantized(Residual().eval(), (3, 8, 8), "w8a8")
    images = torch.randn(32, 3, 8, 8)
    integer.prepare(network, images)
    target = torch.randn(32, 5)
    gradients = []
    for each in (network, integer.simulate(network)):
        network.zero_grad()
        F.mse_loss(each(images), target).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in (network.conv.weight, network.head.weight)]))  # type: ignore[union-attr,operator]
    assert F.cosine_similarity(*gradients, dim=0) > 0.98


def test_ranges_from_noise_are_near_those_of_images() -> None:
    teacher = dfqlib.load_model("digits_resnet8")
    images, _ = dfqlib.data.images_and_labels(dfqlib.load_data("digits"), limit=200)
    steps = []
    for prepare in (lambda n: integer.prepare(n, images), lambda n: integer.prepare_from_noise(n, (1, 16, 16))):
        network = quantize_layers(teacher, QuantSpec.parse("w8a8"))
        calibrate(network, images)
        prepare(network)
        steps.append([q.step.item() for name, q in quantizers(network) if name.startswith("store_")])  # type: ignore[union-attr]
    assert len(steps[0]) == 6
    assert all(0.7 < noise / real < 3 for real, noise in zip(*steps, strict=True))


def test_exporting_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    network = quantized(Residual().eval(), (3, 8, 8))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    export_onnx(network, tmp_path / "net.onnx", (3, 8, 8))
    assert {name: torch.equal(value, before[name]) for name, value in network.state_dict().items()} == dict.fromkeys(
        before, True
    )


def test_the_last_steps_of_express_can_be_those_of_the_file(tmp_path: Path) -> None:
    teacher = dfqlib.load_model("digits_resnet8")
    tiny = {"images": 32, "synthesis_steps": 5, "steps": 10, "batch": 16, "progress": False}
    plain, faithful = (dfqlib.quantize(teacher, (1, 16, 16), integer_share=share, **tiny) for share in (0.0, 0.5))
    grids = [[n for n, _ in quantizers(each.model) if n.startswith("store_")] for each in (plain, faithful)]
    assert grids[0] == []
    assert len(grids[1]) == 6
    weights = [each.model.get_parameter("layer1.0.conv1.weight") for each in (plain, faithful)]
    assert not torch.equal(*weights)
    found, _ = logits_of_file(export_onnx(faithful, tmp_path / "net.onnx", (1, 16, 16)), faithful.images)
    assert torch.equal(found, predict(integer.simulate(faithful.model), faithful.images))
    torch.testing.assert_close(predict(faithful.model, faithful.images), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model", [Residual, Mobile, lambda: nn.Sequential(Residual().stem, Residual().conv, nn.Flatten())]
)
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2"])
def test_a_settled_network_computes_what_its_integers_do(model: Callable[[], nn.Module], bits: str) -> None:
    network, images = quantized(odd_batch_norms(model()), (3, 8, 8), bits), torch.randn(64, 3, 8, 8)
    integer.prepare(network, images)
    expected = predict(integer.simulate(network), images)
    integer.settle(network)
    found = predict(integer.simulate(network), images)
    torch.testing.assert_close(found, expected)
    # Sums in another order may move a value across the middle between two codes.
    assert ((predict(network, images) - expected).abs().amax(1) < 1e-4).float().mean() > 0.95


def test_a_batchnorm_without_a_bias_of_its_own_is_settled_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    for _ in range(5):
        model(torch.randn(32, 3, 8, 8) + 0.3)
    network, images = quantized(model.eval(), (3, 8, 8)), torch.randn(64, 3, 8, 8)
    integer.prepare(network, images)
    integer.settle(network)
    difference = predict(network, images) - predict(integer.simulate(network), images)
    assert (difference.abs().amax(1) < 1e-4).float().mean() > 0.95


def test_a_saved_network_keeps_the_grids_of_its_sums(tmp_path: Path) -> None:
    model, images = odd_batch_norms(Residual()), torch.randn(20, 3, 8, 8)
    network = quantized(model, (3, 8, 8))
    integer.prepare(network, images)
    dfqlib.save_quantized(network, tmp_path / "q.pt")
    loaded = dfqlib.load_quantized(tmp_path / "q.pt", model)
    assert torch.equal(integer.simulate(loaded)(images), integer.simulate(network)(images))


TINY = [f"--set={name}" for name in ("images=8", "synthesis_steps=2", "steps=2", "batch=4")]


def test_the_command_line_exports_at_once_or_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize = ["quantize", "--arch", "digits_resnet8", "--quiet", *TINY, "--output"]
    assert main([*quantize, str(tmp_path / "direct.onnx"), "--container", "int4"]) == 0
    assert main([*quantize, str(tmp_path / "q.pt")]) == 0
    capsys.readouterr()
    later = ["export", str(tmp_path / "q.pt"), "--output", str(tmp_path / "later.onnx"), "--evaluate", "digits"]
    assert main(later) == 0
    printed = capsys.readouterr().out
    assert "agreement with the integer simulation: 100.00 % of 500 images" in printed
    network = dfqlib.load_quantized(tmp_path / "q.pt")
    stored = ", ".join(f"{count} of {layer}" for layer, count in integer.narrowed(network).items())
    assert f"channels stored in 7 bits instead of 8, to compute the same on any processor: {stored}\n" in printed
    assert (tmp_path / "direct.onnx").stat().st_size < (tmp_path / "later.onnx").stat().st_size


def test_the_command_line_says_before_the_work_what_cannot_be_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "q.onnx")
    assert main(["quantize", "--arch", "digits_resnet8", "--scheme", "affine", "--output", output]) == 2
    assert "is affine" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none.pt"), "--output", output]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_floating_point_twin_is_the_network_without_quantizers() -> None:
    model = odd_batch_norms(Residual())
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(float_network(quantized(model, (3, 8, 8)))(images), model(images))
