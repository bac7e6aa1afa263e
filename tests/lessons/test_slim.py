"""The slim generator keeps the protocol of the published ones at a fraction of their size."""

from __future__ import annotations

import pytest
import torch

from dfqlib.errors import InputError
from dfqlib.generators import AkdGenerator, ConditionalGenerator
from dfqlib.lessons.slim import SlimGenerator
from dfqlib.synthesis import from_generator


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
@pytest.mark.parametrize("classes", [None, 10])
def test_makes_normalized_images_and_passes_gradients_to_all_of_its_weights(
    shape: tuple[int, int, int], classes: int | None
) -> None:
    generator = SlimGenerator(shape, classes)
    images = generator.sample(64)
    assert images.shape == (64, *shape)
    assert images.mean((0, 2, 3)).abs().max() < 1e-3
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.05
    images.square().mul(torch.randn_like(images)).sum().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_labels_decide_and_are_balanced_where_images_are_drawn() -> None:
    generator = SlimGenerator((1, 16, 16), 10).eval()
    z = torch.randn(10, generator.latent)
    assert not torch.equal(generator(z, torch.zeros(10).long()), generator(z, torch.ones(10).long()))
    images, labels = from_generator(generator, 20)
    assert images.shape == (20, 1, 16, 16)
    assert labels is not None
    assert labels.bincount().tolist() == [2] * 10
    with pytest.raises(InputError, match="takes none"):
        SlimGenerator((1, 16, 16)).sample(4, torch.zeros(4).long())


def test_is_far_smaller_than_the_published_generators() -> None:
    def size(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    slim = size(SlimGenerator((3, 32, 32), 10))
    assert slim < size(ConditionalGenerator((3, 32, 32), 10)) / 5
    assert slim < size(AkdGenerator((3, 32, 32))) / 20


def test_refuses_images_that_are_not_divisible_by_four() -> None:
    with pytest.raises(InputError, match="divisible by 4"):
        SlimGenerator((1, 15, 16))
