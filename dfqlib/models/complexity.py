"""What a network costs: how many parameters it has, and how many multiply-accumulates an image takes."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfqlib.errors import InputError


def complexity(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of convolutions and matrix products for one image.

    Biases, BatchNorm, activations and pooling add parameters but no multiply-accumulates, as in most papers' tables
    of "FLOPs"; some count them, and some count a multiply-accumulate twice. PyTorch's own counter watches the
    operations as they run, so that a functional call counts like a module.

    Args:
        model: any network called with one tensor; left as it is. On the meta device nothing is computed.
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
