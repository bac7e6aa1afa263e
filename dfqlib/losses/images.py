"""Losses of the pixels."""

from torch import Tensor


def total_variation_loss(images: Tensor) -> Tensor:
    """Total variation (DeepInversion): small for smooth images.

    Sums the Euclidean norms of the differences between neighboring pixels: to the right, down, and both diagonals.

    Args:
        images: shape (batch, channels, height, width).

    Returns:
        Scalar tensor, differentiable in ``images``.

    Taught in notebook 03.
    """
    right = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    return right.norm() + down.norm() + falling.norm() + rising.norm()
