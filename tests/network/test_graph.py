"""What the graph says of signs, order and sizes is what running it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.errors import InputError
from dfqlib.network import graph
from dfqlib.quantizer import QuantSpec, quantize_layers, quantizers

ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "relu6": F.relu6, "leaky": F.leaky_relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "max pool": lambda x: F.max_pool2d(x, 2, 1, 1), "avg pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "half": lambda x: 0.5 * x, "less": lambda x: x - 0.3, "more": lambda x: torch.add(x, other=-0.2),
    "clamp": lambda x: x.clamp(min=0.1), "clip": lambda x: torch.clamp(x, -0.5, 0.5), "pad": lambda x: F.pad(x, (1, 1)),
    "pad below": lambda x: F.pad(x, (1, 0), value=-1.0), "negative": lambda x: -x, "square": lambda x: x * x,
    "bicubic": lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"), "mean": lambda x: x.mean((2, 3), True),
    "bilinear": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), "abs": torch.abs,
    "hardtanh": F.hardtanh, "rolled": lambda x: x.roll(1, 2), "flat": lambda x: x.flatten(2).unsqueeze(3),
}  # fmt: skip
TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "alpha": lambda x, y: torch.add(x, y, alpha=-0.5), "difference": lambda x, y: x - y,
    "product": lambda x, y: x * y, "cat": lambda x, y: torch.cat([x, y], 1), "maximum": torch.maximum,
    "minimum": torch.minimum, "quotient": lambda x, y: x / (1 + y),
}  # fmt: skip
STEPS = st.lists(st.tuples(st.sampled_from([*ONE, *TWO]), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=7)


class Random(nn.Module):
    """Operations one after another, each on tensors that are there already and fit."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for name, first, second in self.steps:
            a, b = made[first % len(made)], made[second % len(made)]
            made.append(ONE[name](a) if name in ONE else TWO[name](a, a if first % 2 else b))
        return made[-1]


class Smallest(fx.Interpreter):
    def of(self, images: Tensor) -> dict[fx.Node, float]:
        self.found: dict[fx.Node, float] = {}
        self.run(images)
        return self.found

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = float(value.min())
        return value


@settings(deadline=None, max_examples=150)
@given(STEPS, st.integers(0, 1000))
def test_what_counts_as_non_negative_never_is_negative(steps: list[tuple[str, int, int]], seed: int) -> None:
    model, images = Random(steps), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    try:
        model(images)
    except RuntimeError:  # two shapes that do not fit
        return
    traced, _ = graph.trace(model)
    least = Smallest(traced).of(images)
    for node in graph.non_negative(traced.graph):
        assert least[node] >= 0, node


def test_a_sum_of_many_sums_is_judged_in_no_time() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(x)
            for _ in range(200):
                x = x + x
            return x

    traced, _ = graph.trace(Doubling())
    assert len(graph.non_negative(traced.graph)) == 201


class Opaque(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) if x.sum() > -1e9 else x


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_first_and_last_layer_are_those_that_run_first_and_last(place: int) -> None:
    blocks = [Opaque(3, 3) if each == place else nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for each in range(4)]
    network = quantize_layers(nn.Sequential(*blocks), QuantSpec(4, 4, edge_bits=8))
    names = [f"{each}.conv" if each == place else f"{each}.0" for each in range(4)]
    bits = {name.removesuffix(".weight_quantizer"): q.bits for name, q in quantizers(network) if "weight" in name}
    assert [bits[name] for name in names] == [8, 4, 4, 8]
    tensors = [q.bits for name, q in quantizers(network) if "weight" not in name]
    assert sorted(tensors) == [4, 4, 8, 8]


def test_sizes_are_numbers_where_they_do_not_depend_on_the_batch() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, x.size()[2:]).view(x.size(0), x.shape[1])

    traced, _ = graph.trace(Sized())
    fixed = graph.with_fixed_sizes(traced, (3, 4, 6))
    (pool,) = [node for node in fixed.graph.nodes if node.target is F.avg_pool2d]
    assert pool.args[1] == (4, 6)
    images = torch.randn(5, 3, 4, 6)
    assert torch.equal(fixed(images), Sized()(images))
    with pytest.raises(InputError, match="image_shape"):
        graph.with_fixed_sizes(graph.trace(nn.Sequential(nn.Flatten(), nn.Linear(72, 2)))[0], (3, 5, 5))


def test_a_forward_is_called_with_images_whatever_else_it_takes() -> None:
    class Many(nn.Module):
        def forward(self, pictures: Tensor, *more: Tensor, gain: float = 2.0, **rest: Tensor) -> Tensor:
            return gain * pictures

    traced, _ = graph.trace(Many())
    assert [node.target for node in traced.graph.nodes if node.op == "placeholder"] == ["pictures"]
    assert torch.equal(traced(torch.ones(1, 2)), torch.full((1, 2), 2.0))


def test_an_activation_in_place_that_is_called_twice_overwrites_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y, z = x * 1, x * 2
            self.act(y)
            self.act(z)
            return y + z

    images = torch.randn(4, 5)
    assert torch.equal(graph.trace(Twice())[0](images), Twice()(images))
