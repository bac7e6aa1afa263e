"""Running a classifier: its logits, in eval mode, with a clear error where the images do not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfqlib.errors import InputError

__all__ = ["evaluating", "logits_of", "predict"]


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
