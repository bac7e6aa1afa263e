"""A copy in which a layer is its weight and geometry, or one line that says why there is none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import dfqlib
from dfqlib.errors import InputError
from dfqlib.network.folding import fold
from dfqlib.network.inference import predict
from dfqlib.network.plain import plain, unwrapped

SHAPE = (3, 8, 8)


def network(*more: nn.Module, classes: int = 4) -> nn.Module:
    ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *more, *ends).eval()


def refused(model: nn.Module, match: str) -> None:
    with pytest.raises(InputError, match=match) as raised:
        dfqlib.quantize(model, SHAPE, recipe="equalize", progress=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "computed",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: parametrizations.orthogonal(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.3), "weight", 0.3),
        lambda layer: torch.nn.utils.weight_norm(layer),
        lambda layer: torch.nn.utils.spectral_norm(layer),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of.*:FutureWarning")
def test_computed_weights_become_parameters_of_the_copy_alone(computed: Callable[[nn.Module], nn.Module]) -> None:
    model = network(computed(nn.Conv2d(8, 8, 3, padding=1)))
    images = torch.randn(4, *SHAPE)
    expected, kinds = predict(model, images), [type(module) for module in model.modules()]
    copied = plain(model)
    assert isinstance(copied[3].weight, nn.Parameter)  # type: ignore[index]
    assert type(copied[3]) is nn.Conv2d  # type: ignore[index]
    torch.testing.assert_close(predict(copied, images), expected)
    torch.testing.assert_close(predict(model, images), expected)
    assert [type(module) for module in model.modules()] == kinds


def test_shared_weights_are_separate_in_the_copy() -> None:
    model = network(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    model[4].weight = model[3].weight  # type: ignore[index]
    copied: Any = plain(model)
    assert copied[3].weight is not copied[4].weight
    images = torch.randn(2, *SHAPE)
    assert torch.equal(predict(copied, images), predict(model, images))


def test_wrappers_are_taken_off() -> None:
    inner = network()
    averaged = torch.optim.swa_utils.AveragedModel(inner)
    assert unwrapped(nn.DataParallel(inner)) is inner
    assert unwrapped(torch.compile(inner)) is inner
    assert isinstance(unwrapped(averaged), nn.Sequential)
    assert unwrapped(torch.compile(nn.DataParallel(inner))) is inner


@pytest.mark.parametrize("place", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("layer", [0, 1, 2, None])
def test_hooks_are_refused_by_the_name_of_the_layer(place: str, layer: int | None) -> None:
    model: Any = network()
    getattr(model if layer is None else model[layer], place)(lambda *_: None)
    refused(model, "it has forward hooks" if layer is None else f'"{layer}" has forward hooks')


def test_frozen_batchnorm_is_no_reason_to_refuse() -> None:
    model = network()
    dfqlib.batchnorm.freeze(model)
    assert dfqlib.quantize(model, SHAPE, recipe="equalize", progress=False).model is not None


def test_scripted_half_double_and_quantized_networks_are_named_for_what_they_are() -> None:
    refused(torch.jit.trace(network(), torch.zeros(1, *SHAPE)), "it is a ScriptModule")
    refused(network().half(), r"torch\.float16.*model\.float\(\)")
    refused(network().double(), r"torch\.float64.*model\.float\(\)")
    refused(dfqlib.quantize(network(), SHAPE, recipe="equalize", progress=False).model, "quantized already")


def test_what_cannot_be_copied_is_named() -> None:
    model: Any = network()
    model[0].lock = threading.Lock()
    refused(model, r'"0\.lock" \(lock\) cannot be copied')


def test_a_tensor_that_a_call_left_behind_is_copied_without_its_graph() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()
            self.last: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            self.last = [y]
            return y

    model = Remembers()
    model(torch.randn(2, *SHAPE))
    assert not model.last[0].is_leaf
    assert torch.equal(plain(model).last[0], model.last[0])  # type: ignore[index]


def test_one_logit_and_random_answers_are_refused_before_the_work() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x)

    refused(network(classes=1), r"one logit.*torch\.cat")
    refused(network(Dropping()), "differ from call to call")


def test_a_replaced_forward_and_a_lazy_layer_are_named() -> None:
    replaced = network()
    replaced.forward = lambda x: x.mean((2, 3))  # type: ignore[method-assign]
    refused(replaced, "the forward was replaced")
    refused(nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten()), '"0" has no weights yet')


@pytest.mark.parametrize("name", ["lambda", "class", 'a"b', "a\\b", "a\nb", "graph", "meta", "code"])
@pytest.mark.parametrize("kind", ["layer", "parameter", "buffer"])
def test_names_that_cannot_stand_in_the_code_of_a_graph_are_refused(name: str, kind: str) -> None:
    model = network()
    if kind == "layer":
        model.add_module(name, nn.Identity())
    elif kind == "parameter":
        model.register_parameter(name, nn.Parameter(torch.ones(())))
    else:
        model.register_buffer(name, torch.ones(()))
    refused(model, "the name .* cannot stand in the Python code that torch.fx writes; rename it")


@pytest.mark.parametrize(("variance", "printed"), [(-0.5, "-0.5"), (1e20, r"1e\+20")])
def test_a_running_variance_that_no_training_leaves_is_named(variance: float, printed: str) -> None:
    model: Any = network()
    model[1].running_var[3] = variance
    refused(model, f'"1" has the running variance {printed} in channel 3')


def test_a_running_variance_that_is_not_a_number_is_named() -> None:
    model: Any = network()
    model[1].running_var[3] = torch.nan
    refused(model, r'"1\.running_var" holds NaN')


@pytest.mark.parametrize("variance", [0.0, 1e10])
def test_dead_and_loud_channels_are_folded_exactly(variance: float) -> None:
    model: Any = network()
    model[1].running_var[3] = variance
    images = torch.randn(4, *SHAPE)
    torch.testing.assert_close(predict(fold(model).network, images), predict(model, images))


def test_weights_of_more_dimensions_than_images_have_are_refused() -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep, self.body = nn.Conv3d(3, 3, 1), network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.deep(x[:, :, None])[:, :, 0])

    refused(Volume(), '"deep.weight" has 5 dimensions')
