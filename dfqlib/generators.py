"""Generator networks: latent vectors to images, trained against a fixed teacher.

``generator(z)`` or ``generator(z, labels)`` maps latent vectors to images, ``generator.sample(n)`` also draws the
vectors. All end in Tanh and a BatchNorm without scale and shift, so that their images have mean 0 and deviation 1 per
channel, like normalized data. Taught in notebook 04.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib.data import check_image_shape
from dfqlib.errors import InputError

BN_EPS = 0.8
"""eps of BatchNorm after the convolutions of the DFQF and GDFQ trunk.

The second argument of the published ``BatchNorm2d(C, 0.8)`` is eps, not the momentum."""


class Generator(nn.Module):
    """Base class of the generators.

    Attributes:
        image_shape: (channels, height, width) of the images.
        latent: length of a latent vector.
        classes: number of labels, or None for a generator without labels.
    """

    def __init__(self, image_shape: tuple[int, int, int], latent: int, classes: int | None, multiple: int) -> None:
        super().__init__()
        check_image_shape(image_shape)
        if image_shape[1] % multiple or image_shape[2] % multiple:
            raise InputError(
                f"image_shape={image_shape} needs height and width divisible by {multiple} for this generator"
            )
        for name, count in (("latent", latent), ("classes", classes)):
            if count is not None and count < 1:
                raise InputError(f"{name}={count} must be 1 or more")
        self.image_shape = image_shape
        self.latent = latent
        self.classes = classes

    def sample(self, n: int, labels: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
        """Images of latent vectors drawn from a standard normal.

        Args:
            n: number of images.
            labels: of shape (n,), or mixtures of shape (n, classes); drawn uniformly when a generator with labels
                gets none.
            rng: source of randomness; torch's global one by default.

        Returns:
            Images of shape (n, channels, height, width), differentiable in the generator's weights.

        Raises:
            InputError: ``n`` is not positive, or ``labels`` do not fit the generator.
        """
        if n < 1:
            raise InputError(f"n={n} must be 1 or more")
        device = next(self.parameters()).device
        z = torch.randn(n, self.latent, generator=rng, device=device)
        if self.classes is None:
            if labels is not None:
                raise InputError(f"labels given to {type(self).__name__}, which takes none: use ConditionalGenerator")
            return self(z)
        if labels is None:
            labels = torch.randint(self.classes, (n,), generator=rng, device=device)
        return self(z, labels)


class UnconditionalGenerator(Generator):
    """Generator of the released code of DFQF and DAFL: two upsampling convolutions from a quarter of the image's size.

    DFQF's text names only DCGAN as its architecture. Weights here keep PyTorch's initialization; DFQF's released code
    draws them from N(0, 0.02).

    Args:
        image_shape: (channels, height, width), height and width divisible by 4.
        latent: length of a latent vector; 1000 in the released code of both.

    Raises:
        InputError: the shape cannot be generated.

    Taught in notebook 04.
    """

    def __init__(self, image_shape: tuple[int, int, int], latent: int = 1000) -> None:
        super().__init__(image_shape, latent, None, 4)
        self.trunk = _Trunk(image_shape, latent)

    def forward(self, z: Tensor) -> Tensor:
        return self.trunk(z)


class ConditionalGenerator(Generator):
    """Generator of GDFQ for small images: the latent vector is multiplied by an embedding of the label.

    ``forward(z, labels)`` takes labels of shape (batch,), or mixtures of shape (batch, classes) that superpose the
    embeddings (Qimera).

    Args:
        image_shape: (channels, height, width), height and width divisible by 4.
        classes: number of labels.
        latent: length of a latent vector and of an embedding; 100 in the paper.

    Raises:
        InputError: the shape cannot be generated, or labels do not fit.

    Taught in notebook 04.
    """

    categorical = False
    """Whether BatchNorm depends on the label."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int, latent: int = 100) -> None:
        if classes is None:
            raise InputError("classes=None: images by label need the number of labels, for example classes=10")
        super().__init__(image_shape, latent, classes, 4)
        self.embedding = nn.Embedding(classes, latent)
        self.trunk = _Trunk(image_shape, latent, classes if self.categorical else None)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.trunk(_embed(self.embedding, labels) * z, labels if self.categorical else None)


class CategoricalBatchNormGenerator(ConditionalGenerator):
    """Generator after GDFQ's for ImageNet: each class has its own scale and shift in each BatchNorm.

    Here the latent vector is also multiplied by the label's embedding; GDFQ's released generator for ImageNet does not
    multiply it. Arguments and errors are those of ``ConditionalGenerator``.

    Taught in notebook 04.
    """

    categorical = True


class AkdGenerator(Generator):
    """Generator of AKD: three upsampling convolutions from an eighth of the image's size.

    Args:
        image_shape: (channels, height, width), height and width divisible by 8.
        latent: length of a latent vector; 512 in the paper.

    Raises:
        InputError: the shape cannot be generated.

    Taught in notebook 04.
    """

    def __init__(self, image_shape: tuple[int, int, int], latent: int = 512) -> None:
        super().__init__(image_shape, latent, None, 8)
        channels, height, width = image_shape
        self.start = (512, height // 8, width // 8)
        self.linear = nn.Linear(latent, math.prod(self.start))
        blocks: list[nn.Module] = []
        for inputs, outputs in ((512, 256), (256, 128), (128, 64)):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
            blocks += [nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks, *_to_image(64, channels))

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(self.linear(z).unflatten(1, self.start))


class _Trunk(nn.Module):
    """Latent vectors to images from a quarter of their size; ``classes`` makes the BatchNorm categorical."""

    def __init__(self, image_shape: tuple[int, int, int], latent: int, classes: int | None = None) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.start = (128, height // 4, width // 4)
        self.linear = nn.Linear(latent, math.prod(self.start))
        self.norm0 = _norm(128, 1e-5, classes)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.norm1 = _norm(128, BN_EPS, classes)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm2 = _norm(64, BN_EPS, classes)
        self.to_image = nn.Sequential(*_to_image(64, channels))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        condition = () if labels is None else (labels,)
        x = self.norm0(self.linear(z).unflatten(1, self.start), *condition)
        x = self.norm1(self.conv1(F.interpolate(x, scale_factor=2)), *condition)
        x = self.norm2(self.conv2(F.interpolate(F.leaky_relu(x, 0.2), scale_factor=2)), *condition)
        return self.to_image(F.leaky_relu(x, 0.2))


class _CategoricalBatchNorm(nn.Module):
    """BatchNorm whose scale and shift depend on the label."""

    def __init__(self, channels: int, eps: float, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.scale = nn.Embedding.from_pretrained(torch.ones(classes, channels), freeze=False)
        self.shift = nn.Embedding.from_pretrained(torch.zeros(classes, channels), freeze=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scale, shift = (_embed(table, labels)[:, :, None, None] for table in (self.scale, self.shift))
        return torch.addcmul(shift, self.norm(x), scale)


def _norm(channels: int, eps: float, classes: int | None) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=eps) if classes is None else _CategoricalBatchNorm(channels, eps, classes)


def _to_image(features: int, channels: int) -> list[nn.Module]:
    return [nn.Conv2d(features, channels, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(channels, affine=False)]


def _embed(table: nn.Embedding, labels: Tensor) -> Tensor:
    """Rows of ``table`` for labels (batch,), or their weighted sums for mixtures (batch, classes)."""
    classes = table.num_embeddings
    if labels.is_floating_point():
        if labels.dim() != 2 or labels.shape[1] != classes:
            raise InputError(f"labels as mixtures need shape (batch, {classes}), got {tuple(labels.shape)}")
        return labels @ table.weight
    if labels.dim() != 1:
        raise InputError(f"labels need shape (batch,), got {tuple(labels.shape)}")
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= classes:
        raise InputError(f"labels must be from 0 to {classes - 1}, got {low} to {high}")
    return table(labels)
