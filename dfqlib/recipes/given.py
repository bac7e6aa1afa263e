"""Images that the user gives to a recipe: checked, moved to the network's device, described in the report."""

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from dfqlib.errors import InputError, NonFiniteError
from dfqlib.training.task import Task

LIKE = "a float tensor (N, C, H, W), normalized like the data, such as dfqlib.data.images_and_labels(loader)[0]"


def check(images: Any) -> None:
    """Raise InputError unless ``images`` is a batch of finite images."""
    if not isinstance(images, Tensor):
        raise InputError(f"images={type(images).__name__} must be {LIKE}")
    if images.dim() != 4 or len(images) == 0 or not images.is_floating_point():
        raise InputError(f"images: {images.dtype} of shape {tuple(images.shape)} must be {LIKE}")
    if not bool(torch.isfinite(images).all()):
        raise NonFiniteError("images: some pixels are NaN or infinite; leave those images out")


def take(task: Task, images: Tensor) -> Tensor:
    """The images on the teacher's device, shape (N, C, H, W), float32.

    Raises:
        InputError: their shape is not the task's.
    """
    if tuple(images.shape[1:]) != tuple(task.image_shape):
        raise InputError(
            f"images: each has shape {tuple(images.shape[1:])}, image_shape={tuple(task.image_shape)}; give the same"
        )
    return images.detach().to(task.device, torch.float32).contiguous(memory_format=torch.channels_last)


def spread(images: Tensor, count: int) -> Tensor:
    """At most ``count`` of the images, spread evenly over all, since a folder's images are sorted by class."""
    count = min(count, len(images))
    return images[torch.arange(count, device=images.device) * len(images) // count]


def described(settings: Any) -> dict[str, Any]:
    """The fields of a settings dataclass by name, a tensor as its shape and digest."""
    values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    return {name: _digest(value) if isinstance(value, Tensor) else value for name, value in values.items()}


def _digest(images: Tensor) -> str:
    content = images.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{'x'.join(map(str, images.shape))} {images.dtype} {hashlib.sha256(content).hexdigest()[:12]}"
