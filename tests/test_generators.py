"""The generators have the published layers and take labels, or mixtures of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dfqlib.errors import InputError
from dfqlib.generators import (
    AkdGenerator,
    CategoricalBatchNormGenerator,
    ConditionalGenerator,
    Generator,
    UnconditionalGenerator,
)

SHAPE = (3, 16, 24)


def _all() -> list[Generator]:
    return [
        UnconditionalGenerator(SHAPE, latent=20),
        ConditionalGenerator(SHAPE, classes=5),
        CategoricalBatchNormGenerator(SHAPE, classes=5),
        AkdGenerator(SHAPE, latent=20),
    ]


@pytest.mark.parametrize("generator", _all(), ids=lambda generator: type(generator).__name__)
def test_images_are_normalized_and_every_weight_learns(generator: Generator) -> None:
    images = generator.sample(6)
    assert images.shape == (6, *SHAPE)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    (images**3).sum().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())


@pytest.mark.parametrize("generator", _all(), ids=lambda generator: type(generator).__name__)
def test_sampling_repeats_with_its_source_of_randomness(generator: Generator) -> None:
    first, second, other = (generator.sample(2, rng=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_published_sizes() -> None:
    assert UnconditionalGenerator((3, 32, 32)).latent == 1000
    assert ConditionalGenerator((3, 32, 32), 10).latent == 100
    assert AkdGenerator((3, 32, 32)).latent == 512
    assert UnconditionalGenerator((3, 32, 32)).trunk.linear.out_features == 128 * 8 * 8
    assert AkdGenerator((3, 32, 32)).linear.out_features == 512 * 4 * 4
    assert widths(UnconditionalGenerator((3, 32, 32))) == widths(ConditionalGenerator((3, 32, 32), 10)) == [128, 64, 3]
    assert widths(AkdGenerator((3, 32, 32))) == [256, 128, 64, 3]


def widths(generator: Generator) -> list[int]:
    """Channels that each convolution puts out."""
    return [module.out_channels for module in generator.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("generator", _all()[:3], ids=lambda generator: type(generator).__name__)
def test_point_eight_is_the_eps_of_two_norms_and_nobodys_momentum(generator: Generator) -> None:
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.eps for norm in norms] == [1e-5, 0.8, 0.8, 1e-5]
    assert {norm.momentum for norm in norms} == {0.1}


@pytest.mark.parametrize("generator", _all(), ids=lambda generator: type(generator).__name__)
def test_it_ends_in_tanh_and_a_norm_without_scale(generator: Generator) -> None:
    *_, activation, norm = [module for module in generator.modules() if not list(module.children())]
    assert isinstance(activation, nn.Tanh)
    assert isinstance(norm, nn.BatchNorm2d)
    assert not norm.affine


@pytest.mark.parametrize("kind", [ConditionalGenerator, CategoricalBatchNormGenerator])
def test_a_mixture_of_one_label_is_that_label(kind: type[ConditionalGenerator]) -> None:
    generator = kind(SHAPE, 5).eval()
    z, labels = torch.randn(4, 100), torch.tensor([0, 3, 1, 4])
    one_hot = nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(generator(z, one_hot), generator(z, labels))
    assert not torch.allclose(generator(z, one_hot * 0.6 + 0.08), generator(z, labels))


def test_labels_multiply_the_latent_vector() -> None:
    generator = ConditionalGenerator(SHAPE, 5).eval()
    z, labels = torch.randn(4, 100), torch.tensor([0, 3, 1, 4])
    torch.testing.assert_close(generator(z, labels), generator.trunk(generator.embedding.weight[labels] * z))


def test_each_class_has_a_scale_and_shift_of_its_own() -> None:
    generator = CategoricalBatchNormGenerator(SHAPE, 5).eval()
    z = torch.randn(1, 100).expand(2, 100)
    same = torch.tensor([2, 2])
    assert torch.equal(*generator(z, same))
    with torch.no_grad():
        generator.embedding.weight.fill_(1.0)
        generator.trunk.norm1.shift.weight[3] += 1
    assert not torch.allclose(*generator(z, torch.tensor([2, 3])))


@pytest.mark.parametrize("shape", [(3, 30, 32), (3, 32, 18), (3, 32), (0, 32, 32), (3, 0, 32)])
def test_shapes_that_cannot_be_generated(shape: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="image_shape"):
        UnconditionalGenerator(shape)
    with pytest.raises(InputError, match="image_shape"):
        ConditionalGenerator(shape, 10)


def test_akd_needs_multiples_of_eight() -> None:
    with pytest.raises(InputError, match="divisible by 8"):
        AkdGenerator((3, 28, 28))
    assert UnconditionalGenerator((1, 28, 28)).sample(2).shape == (2, 1, 28, 28)


def test_labels_that_do_not_fit() -> None:
    generator = ConditionalGenerator(SHAPE, 5)
    z = torch.randn(2, 100)
    for labels in (torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.tensor([[0], [1]]), torch.ones(2, 4)):
        with pytest.raises(InputError, match="labels"):
            generator(z, labels)
    with pytest.raises(InputError, match="takes none"):
        UnconditionalGenerator(SHAPE).sample(2, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="n=0"):
        generator.sample(0)
    with pytest.raises(InputError, match="classes=0"):
        ConditionalGenerator(SHAPE, 0)


@pytest.mark.parametrize("kind", [ConditionalGenerator, CategoricalBatchNormGenerator])
def test_a_conditional_generator_needs_the_number_of_classes(kind: Any) -> None:
    with pytest.raises(InputError, match="classes=None: images by label need the number of labels"):
        kind(SHAPE, None)
