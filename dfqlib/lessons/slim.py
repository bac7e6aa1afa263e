"""A generator small enough to be trained many times within a lesson.

The published generators (``dfqlib.generators``) cost several times what the small teachers of the lessons do, and a
comparison with error bars trains dozens of them.
"""

import math

import torch
from torch import Tensor, nn

from dfqlib.generators import Generator

__all__ = ["SlimGenerator"]


class SlimGenerator(Generator):
    """The trunk of the published generators with a quarter of their channels: about 47,000 weights for the digits.

    Noise, multiplied by the label's embedding where it takes labels as in GDFQ, to a quarter of the image's size, two
    upsampling convolutions, then Tanh and a BatchNorm without scale and shift.

    Args:
        image_shape: (channels, height, width), height and width divisible by 4.
        classes: number of labels it takes; None for a generator without labels.
        latent: length of a latent vector.
        width: channels, halved in the last convolution but one.

    Raises:
        InputError: the shape cannot be generated.

    Taught in notebook 06.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], classes: int | None = None, latent: int = 64, width: int = 32
    ) -> None:
        super().__init__(image_shape, latent, classes, 4)
        channels, height, side = image_shape
        self.start = (width, height // 4, side // 4)
        self.embedding = None if classes is None else nn.Embedding(classes, latent)
        self.linear = nn.Linear(latent, math.prod(self.start))
        self.blocks = nn.Sequential(
            *(nn.BatchNorm2d(width), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)),
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Upsample(scale_factor=2)),
            *(nn.Conv2d(width, width // 2, 3, padding=1), nn.BatchNorm2d(width // 2), nn.ReLU()),
            *(nn.Conv2d(width // 2, channels, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(channels, affine=False)),
        )

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latent vectors (B, latent), and labels (B,) where it takes them, to images (B, C, H, W)."""
        if self.embedding is not None:
            if labels is None:
                labels = torch.randint(self.embedding.num_embeddings, (len(z),), device=z.device)
            z = z * self.embedding(labels)
        return self.blocks(self.linear(z).unflatten(1, self.start))
