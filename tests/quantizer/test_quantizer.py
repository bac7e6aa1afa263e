"""Facts about fake quantization and about where quantizers sit in a network."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib.errors import InputError
from dfqlib.models.resnet import CifarResNet
from dfqlib.network import graph
from dfqlib.quantizer import (
    AffineQuantizer,
    QuantSpec,
    StepQuantizer,
    affine_quantize,
    calibrate,
    check_steps,
    fake_quantize,
    integer_range,
    parameter_groups,
    quantize_layers,
    quantizers,
    set_mode,
)
from dfqlib.quantizer.functions import plain_fake_quantize

bits_and_sign = st.tuples(st.integers(2, 8), st.booleans())


def tensors(size: int = 64) -> st.SearchStrategy[Tensor]:
    return st.integers(0, 2**31 - 1).map(lambda seed: torch.randn(size, generator=torch.Generator().manual_seed(seed)))


@given(tensors(), bits_and_sign, st.floats(0.01, 2.0))
def test_quantizing_twice_changes_nothing(x: Tensor, width: tuple[int, bool], step: float) -> None:
    qmin, qmax = integer_range(*width)
    once = fake_quantize(x, step, qmin, qmax)
    assert torch.equal(fake_quantize(once, step, qmin, qmax), once)
    assert len(once.unique()) <= 2 ** width[0]


@given(tensors(), bits_and_sign, st.floats(0.01, 2.0))
def test_error_is_half_a_step_inside_the_range_and_the_grid_is_monotone(
    x: Tensor, width: tuple[int, bool], step: float
) -> None:
    qmin, qmax = integer_range(*width)
    quantized = fake_quantize(x, step, qmin, qmax)
    inside = (x / step >= qmin) & (x / step <= qmax)
    assert ((quantized - x).abs()[inside] <= step / 2 * (1 + 1e-5)).all()
    order = x.argsort()
    assert (quantized[order].diff() >= 0).all()


def test_learned_step_by_hand() -> None:
    """DFQF, Eq. 10: codes -4, -0.6, 0.52 and 10 in steps of 1/2 are clamped and rounded to -2, -1, 1 and 1."""
    x = torch.tensor([-2.0, -0.3, 0.26, 5.0])
    assert fake_quantize(x, 0.5, -2, 1).tolist() == [-1.0, -0.5, 0.5, 0.5]


def test_affine_by_hand() -> None:
    """GDFQ, Eq. 6, with two bits: scale 3 / (u - l), zero point round(scale l) + 2, codes from -2 to 1."""
    x = torch.tensor([-0.7, -0.5, -0.2, 0.3, 0.6, 2.0])  # scale 2, zero point 1: -2.4, -2, -1.4, -0.4, 0.2, 3
    assert affine_quantize(x, -0.5, 1.0, 2).tolist() == [-0.5, -0.5, 0.0, 0.5, 0.5, 1.0]
    rows = torch.tensor([[-0.2, 0.3], [0.4, 3.2]])  # the second channel: scale 1, zero point 2: -1.6, 1.2
    bounds = torch.tensor([-0.5, 0.0]), torch.tensor([1.0, 3.0])
    assert affine_quantize(rows, *bounds, 2).tolist() == [[0.0, 0.5], [0.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("qmin", "qmax"), [(-4, 3), (0, 15), (-128, 127)])
@pytest.mark.parametrize("step", [torch.tensor(0.25), torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)])
def test_the_fast_kernel_equals_its_plain_twin_in_values_and_gradients(
    step: Tensor, qmin: int, qmax: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 5, generator=generator, dtype=dtype) * 3
    x[0, :, 0, 0], x[0, :, 0, 1] = (bound * step.to(dtype).expand(1, 3, 1, 1).flatten() for bound in (qmin, qmax))
    upstream = torch.randn(x.shape, generator=generator, dtype=dtype)
    fast, plain = [(x.clone().requires_grad_(), step.to(dtype).clone().requires_grad_()) for _ in range(2)]
    values = fake_quantize(*fast, qmin, qmax), plain_fake_quantize(*plain, qmin, qmax)
    torch.testing.assert_close(*values)
    for each in values:
        (each * upstream).sum().backward()
    torch.testing.assert_close(fast[0].grad, plain[0].grad)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9  # large terms cancel in the chain of the plain twin
    torch.testing.assert_close(fast[1].grad, plain[1].grad, rtol=0, atol=tolerance)


def test_a_clipped_value_moves_the_step_by_its_bound() -> None:
    for value, (qmin, qmax), bound in ((10.0, (0, 15), 15), (-10.0, (-8, 7), -8)):
        step = torch.tensor(0.5, requires_grad=True)
        fake_quantize(torch.tensor([value]), step, qmin, qmax).sum().backward()
        assert step.grad is not None
        assert step.grad.item() == bound


@given(tensors(), st.integers(2, 8))
def test_affine_quantization_keeps_zero_and_stays_near_its_bounds(x: Tensor, bits: int) -> None:
    low, high = x.min(), x.max()
    quantized = affine_quantize(x, low, high, bits)
    step = (high - low) / (2**bits - 1)
    assert ((quantized - x).abs() <= step * 1.01).all()
    assert affine_quantize(torch.zeros(1), low, high, bits).item() == 0
    assert len(quantized.unique()) <= 2**bits


def test_affine_range_of_a_constant_stays_put() -> None:
    """The recursive bias correction of GDFQ's released code blows the range up near step 20."""
    quantizer = AffineQuantizer(4)
    quantizer.mode = "calibrate"
    for _ in range(200):
        quantizer(torch.tensor([[-1.0, 1.0]]))
        assert quantizer.high.item() == pytest.approx(1.0)
        assert quantizer.low.item() == pytest.approx(-1.0)


def test_affine_range_is_the_bias_corrected_moving_average() -> None:
    quantizer = AffineQuantizer(4)
    quantizer.mode = "calibrate"
    average, highs = 0.0, [1.0, 3.0, 2.0, 7.0]
    for high in highs:
        quantizer(torch.tensor([[0.0, high]]))
        average = 0.9 * average + 0.1 * high
    assert quantizer.high.item() == pytest.approx(average / (1 - 0.9 ** len(highs)), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [("w4", "bits=\"?'?w4"), ("4/4", "both widths"), ("w1a4", "weight_bits=1"), ("w4a17", "activation_bits=17")],
)
def test_unknown_bits_are_named_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantSpec.parse(text)


def test_spec_reads_text_and_takes_changes() -> None:
    assert QuantSpec.parse("W3A2") == QuantSpec(weight_bits=3, activation_bits=2)
    assert QuantSpec.parse(QuantSpec(), edge_bits=4) == QuantSpec(edge_bits=4)
    with pytest.raises(InputError, match='"tensor" or "channel"'):
        QuantSpec(granularity="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_a_step_must_be_positive(step: float) -> None:
    with pytest.raises(InputError, match="step="):
        fake_quantize(torch.ones(3), step, 0, 3)


class Residual(nn.Module):
    """Functional ReLUs, a residual sum, pooling: nothing of it is an nn.ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.conv(x) + x)
        x = self.other(x) + x
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def quantized(model: nn.Module, spec: QuantSpec | None = None, shape: tuple[int, ...] = (8, 1, 6, 6)) -> nn.Module:
    network = quantize_layers(model, spec or QuantSpec())
    calibrate(network, torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    return network


def test_one_tensor_has_one_quantizer_whatever_made_it() -> None:
    network = quantized(Residual())
    names = {name for name, _ in quantizers(network) if "weight" not in name}
    # the input, two functional ReLUs and the pooled tensor; the last sum feeds no layer directly
    assert len(names) == 4
    signs = {name: q.signed for name, q in quantizers(network) if isinstance(q, StepQuantizer)}
    assert signs["quantize_x"]
    assert not signs["quantize_relu"]
    assert signs["quantize_adaptive_avg_pool2d"]  # the pooled sum can be negative


def test_the_skip_connection_sees_what_the_layer_sees_unless_told_otherwise() -> None:
    model = Residual().eval()
    with torch.no_grad():
        for parameter in model.conv.parameters():
            parameter.zero_()
    x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    for skip, levels in (("quantized", 16), ("float", 17)):
        network = quantized(model, QuantSpec(skip=skip))  # type: ignore[arg-type]
        seen: list[Tensor] = []
        network.get_submodule("quantize_relu_1").register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        network(x)
        assert (len(seen[0].unique()) <= levels) == (skip == "quantized")


def test_edges_have_their_own_width_and_the_input_has_eight_bits() -> None:
    widths = {name: q.bits for name, q in quantizers(quantized(Residual(), QuantSpec(3, 2, edge_bits=6)))}
    assert widths["quantize_x"] == 8
    assert widths["stem.weight_quantizer"] == widths["head.weight_quantizer"] == 6
    assert widths["quantize_adaptive_avg_pool2d"] == 6
    assert widths["conv.weight_quantizer"] == widths["other.weight_quantizer"] == 3
    assert widths["quantize_relu"] == widths["quantize_relu_1"] == 2


def test_before_calibration_the_network_computes_what_the_model_computes() -> None:
    model = CifarResNet(20).eval()
    x = torch.randn(2, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    network = quantize_layers(model, QuantSpec())
    torch.testing.assert_close(network(x), model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len([name for name, _ in quantizers(network) if "weight" in name]) == 20
    assert len([name for name, _ in quantizers(network) if "weight" not in name]) == 20


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("step", ["learned", "fixed"])
def test_sixteen_bits_are_as_good_as_floating_point(scheme: str, granularity: str, step: str) -> None:
    spec = QuantSpec(16, 16, 16, granularity=granularity, scheme=scheme, step=step)  # type: ignore[arg-type]
    model = Residual().eval()
    network = quantize_layers(model, spec)
    x = torch.randn(8, 1, 6, 6)
    calibrate(network, x, "max")
    torch.testing.assert_close(network(x), model(x), atol=0.03, rtol=0.03)
    trained = {name for name, p in network.named_parameters() if p.requires_grad and "quantize" in name}
    network(x).sum().backward()
    moved = {name for name, p in network.named_parameters() if "quantize" in name and p.grad is not None}
    assert bool(moved) == (step == "learned")
    assert moved == trained or step == "fixed"


class InPlace(nn.Module):
    """An in-place ReLU changes the tensor that the skip connection reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(self.relu(y))
        return (z + y).mean((2, 3))


def test_in_place_activations_keep_their_meaning() -> None:
    model = InPlace().eval()
    x = torch.randn(4, 1, 3, 3)
    traced, _ = graph.trace(model)
    torch.testing.assert_close(traced(x), model(x))
    network = quantized(model, shape=(4, 1, 3, 3))
    network.train()
    network(x).sum().backward()


class Branching(nn.Module):
    """Control flow on values, inside one block of an otherwise plain network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x - self.conv(x)


def test_what_cannot_be_traced_is_quantized_at_its_layers() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), Branching(), nn.Flatten(), nn.Linear(48, 2))
    for model, names in ((plain, {"0", "2.conv", "4"}), (Branching(), {"network.conv"})):
        channels = 1 if model is plain else 3
        network = quantized(model, shape=(8, channels, 4, 4))
        weights = {name.removesuffix(".weight_quantizer") for name, _ in quantizers(network) if "weight" in name}
        assert weights == names
        x = torch.randn(4, channels, 4, 4)
        coarse = network(x)
        set_mode(network, "float")
        torch.testing.assert_close(network(x), model(x))
        assert not torch.equal(coarse, network(x))
    widths = {name: q.bits for name, q in quantizers(quantized(plain, shape=(8, 1, 4, 4))) if "weight" in name}
    assert widths == {"0.weight_quantizer": 8, "2.conv.weight_quantizer": 4, "4.weight_quantizer": 8}


def test_what_stays_in_floating_point_is_listed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 4, 2), nn.Flatten(), nn.Linear(100, 3))
    network = quantize_layers(model, QuantSpec())
    assert network.meta["unquantized"] == ["1"]
    with pytest.raises(InputError, match="no Conv2d or Linear"):
        quantize_layers(nn.Sequential(nn.ReLU(), nn.Flatten()), QuantSpec())


def test_a_shared_layer_has_one_weight_quantizer_and_one_per_input() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 2, 1), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            return self.head(torch.relu(self.conv(x)).mean((2, 3)))

    network = quantized(Shared(), shape=(4, 2, 3, 3))
    assert sorted("weight" in name for name, _ in quantizers(network)) == [False, False, False, True, True]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_negative_value_makes_an_unsigned_quantizer_signed(bits: int) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(bits))
    quantizer, signed = StepQuantizer(bits, signed=False), StepQuantizer(bits, signed=True)
    for each in (quantizer, signed):
        each.calibrate(x.abs())
    assert quantizer.signed is False
    for each in (quantizer, signed):
        each.calibrate(x)
        each.mode = "quantize"
    assert quantizer.signed is True
    assert torch.equal(quantizer(x), signed(x))


def test_lower_bound_keeps_the_threshold_from_an_outlier_ruling_nothing() -> None:
    x = torch.cat([torch.randn(10_000) * 0.01, torch.tensor([1.0])])
    quantizer = StepQuantizer(4, signed=True)
    quantizer.calibrate(x)
    assert quantizer.step.item() * quantizer.qmax < 0.3
    quantizer.lower_bound = 0.3
    quantizer.calibrate(x)
    assert quantizer.step.item() * quantizer.qmax == pytest.approx(0.3)


def test_a_step_that_reached_zero_is_named() -> None:
    network = quantized(Residual())
    with torch.no_grad():
        network.get_parameter("quantize_relu.step").fill_(-0.1)
    with pytest.raises(InputError, match=r"step of quantize_relu became -0\.1"):
        check_steps(network)


def test_steps_train_apart_without_decay() -> None:
    network = quantized(Residual())
    weights, steps = parameter_groups(network, lr=1.0, step_lr=0.1)
    assert len(steps["params"]) == len(list(quantizers(network)))
    assert steps["lr"] == 0.1
    assert steps["weight_decay"] == 0
    assert len(weights["params"]) == len(list(Residual().parameters()))
