"""A small generator that a lesson can train many times."""

import math

import torch
from torch import Tensor, nn

from dfqlib.generators import Generator


class SlimGenerator(Generator):
    """The architecture of the published generators with a quarter of their channels.

    A latent vector, multiplied by the label's embedding as in GDFQ if there are labels, becomes features of a quarter
    of the image's size; two upsampling convolutions, Tanh and a BatchNorm without scale and shift follow.

    Args:
        image_shape: (channels, height, width), height and width divisible by 4.
        classes: number of labels; None for a generator without labels.
        latent: length of a latent vector.
        width: channels, halved after the second upsampling.

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
        """Latent vectors (B, latent), and labels (B,) if there are classes, to images (B, C, H, W)."""
        if self.embedding is not None:
            if labels is None:
                labels = torch.randint(self.embedding.num_embeddings, (len(z),), device=z.device)
            z = z * self.embedding(labels)
        return self.blocks(self.linear(z).unflatten(1, self.start))
