"""Terms of the images themselves."""

from torch import Tensor


def total_variation_loss(images: Tensor) -> Tensor:
    """How much neighboring pixels differ (DeepInversion): small for smooth images.

    Sums the Euclidean norms of the differences to the right, downwards and along both diagonals.

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
