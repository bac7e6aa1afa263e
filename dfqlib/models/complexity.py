"""Parameters and multiply-accumulates of a network."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfqlib.errors import InputError


def complexity(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of parameters, and of multiply-accumulates in convolutions and matrix products for one image.

    Biases, BatchNorm, activations and pooling count as parameters but not as multiply-accumulates, as in most papers'
    tables of "FLOPs". PyTorch's counter records the operations that run, functional calls included.

    Args:
        model: any network called with one tensor; not modified. On the meta device nothing is computed.
        image_shape: (channels, height, width).

    Returns:
        (parameters, multiply_accumulates).

    Raises:
        InputError: the network cannot take images of this shape.

    Taught in notebook 05.
    """
    network = copy.deepcopy(model).eval()
    image = torch.zeros(1, *image_shape, device=next(network.parameters(), torch.empty(0)).device)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            network(image)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"image_shape={tuple(image_shape)} does not suit {type(model).__name__}: {reason}") from error
    return sum(weight.numel() for weight in model.parameters()), counter.get_total_flops() // 2
