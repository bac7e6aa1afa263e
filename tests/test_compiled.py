"""Facts about the compiled kernels: the same numbers as the plain ones, and no harm where nothing can compile."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import dfqlib
from dfqlib.quantizer import StepQuantizer, compiled, fake_quantize, quantize_layers, quantizers, use_compiler
from dfqlib.quantizer.functions import PLAIN, Kernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    made = compiled.kernels()
    if made is PLAIN:
        pytest.skip("PyTorch finds no working C++ compiler here")
    return made


@pytest.fixture
def fresh() -> Iterator[None]:
    """The memory of having compiled is put away for the test."""
    compiled.kernels.cache_clear()
    yield
    compiled.kernels.cache_clear()


def run(x: Tensor, grad: Tensor, step: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    x, step = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(), step.clone().requires_grad_()
    y = fake_quantize(x, step, -2, 5, kernels)
    y.backward(grad)
    assert x.grad is not None
    assert step.grad is not None
    return y.detach(), x.grad, step.grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_float32_codes_and_gradients_are_those_of_the_plain_kernels(
    kernels: Kernels, layout: torch.memory_format
) -> None:
    x, grad = torch.randn(2, 41, 8, 17, 15).unbind()
    x, step = x.contiguous(memory_format=layout), torch.tensor(0.3)
    assert x.numel() > compiled.SMALL
    (y, grad_x, grad_step), (plain_y, plain_x, plain_step) = (run(x, grad, step, each) for each in (kernels, PLAIN))
    assert torch.equal(y, plain_y)
    assert torch.equal(grad_x, plain_x)
    assert y.stride() == plain_y.stride()
    torch.testing.assert_close(grad_step, plain_step, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_they_round_once(kernels: Kernels) -> None:
    x, grad = torch.randn(2, 2 * compiled.SMALL).to(torch.bfloat16).unbind()
    step = torch.tensor(0.3)
    y, _, grad_step = run(x, grad, step, kernels)
    exact, _, exact_step = run(x.float(), grad.float(), step, PLAIN)
    assert torch.equal(y, exact.to(torch.bfloat16))
    torch.testing.assert_close(grad_step, exact_step, rtol=1e-3, atol=1e-2)


def test_steps_per_channel_small_tensors_and_empty_batches_go_the_plain_way(kernels: Kernels) -> None:
    x, grad = torch.randn(2, 3, 2, 3, 3).unbind()
    step = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1)
    for ours, plain in zip(run(x, grad, step, kernels), run(x, grad, step, PLAIN), strict=True):
        assert torch.equal(ours, plain)
    assert fake_quantize(x[:0], torch.tensor(0.1), 0, 15, kernels).shape == (0, 2, 3, 3)


def test_express_learns_the_same_with_them(kernels: Kernels) -> None:
    teacher = dfqlib.load_model("digits_resnet8")
    short = {"images": 16, "synthesis_steps": 2, "steps": 6, "bf16": False}
    runs = [dfqlib.quantize(teacher, (1, 16, 16), "w3a3", progress=False, compiled=c, **short) for c in (True, False)]
    ours, plain = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_it_warns_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    network = quantize_layers(dfqlib.load_model("digits_resnet8"), dfqlib.QuantSpec())
    with pytest.warns(UserWarning, match="install a C\\+\\+ compiler"):
        use_compiler(network)
    assert not any(q.compiled for _, q in quantizers(network) if isinstance(q, StepQuantizer))
