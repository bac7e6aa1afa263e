"""Run a classifier in eval mode, with a clear error where the images do not fit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfqlib.errors import InputError

__all__ = ["Batches", "as_batches", "as_images", "evaluating", "logits_of", "predict"]

Batches = Iterable[tuple[Tensor, Tensor]]
"""A loader of (images, labels)."""


def as_batches(data: Batches | tuple[Tensor, Tensor], argument: str = "loader") -> Batches:
    """Labelled images as batches, from a loader or from one pair (images, labels).

    Raises:
        InputError: neither.
    """
    pair: Any = data
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(each, Tensor) for each in pair):
        images, labels = pair
        if len(images) != len(labels):
            raise InputError(
                f"{argument}: {len(images)} images and {len(labels)} labels; give one label for each image"
            )
        return zip(images.split(256), labels.split(256), strict=True)
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise InputError(f"{argument}={_said(data)} must be a loader of (images, labels), or a pair of such tensors")
    return pair


def as_images(data: Tensor | Batches, argument: str = "images") -> Tensor:
    """Images as one tensor (N, C, H, W), from such a tensor or from a loader of (images, labels).

    Raises:
        InputError: neither, or none.
    """
    if isinstance(data, Tensor):
        found = data
    else:
        batches = data if isinstance(data, Iterable) and not isinstance(data, str) else ()
        parts = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise InputError(f"{argument}={_said(data)} must be images (N, C, H, W), or a loader of (images, labels)")
        found = torch.cat(parts)
    if found.ndim != 4:
        raise InputError(f"{argument}={_said(found)} must be images (N, C, H, W)")
    return found


def _said(value: object) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch: int = 256) -> Tensor:
    """Logits of all images in eval mode, shape (N, classes), on the CPU."""
    with evaluating(model):
        return torch.cat([logits_of(model, part).cpu() for part in images.split(batch)])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits, on the model's device, with a clear error where the images do not fit."""
    place = next(model.parameters(), torch.empty(0)).device
    try:
        logits = model(images.to(place))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        if dtypes and images.dtype not in dtypes:
            raise InputError(
                f"the model has weights in {dtypes.pop()}, the images are {images.dtype}; give model.float()"
            ) from error
        raise InputError(
            f"the model cannot take images of shape {tuple(images.shape[1:])} ({_first_line(error)}); "
            "check image_shape, or resize the images"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model returns {shape}, not logits of shape (batch, classes); wrap it so that it does")
    return logits


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
