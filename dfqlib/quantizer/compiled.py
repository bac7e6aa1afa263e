"""A whole network in kernels compiled for it, where PyTorch finds a compiler.

Taught in notebook 07.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn


def compiled(network: nn.Module, images: Tensor) -> nn.Module:
    """The same function on the same parameters, forward and backward, in kernels made for it; fine-tuning only.

    What lies between two convolutions becomes one pass over memory: the sum with the shortcut, the fake quantizer, the
    factors of its gradients. Weights and their BatchNorm factors are quantized likewise, without Python in between.
    The kernels compute in float32 whatever the tensors' type, so that in bfloat16 they round once where PyTorch's own
    round after each operation; in float32 they differ in the order of sums.

    Compiles at once, in the autocast at hand (ResNet-20: some 20 s on two cores, 5 s from the compiler's cache in later
    processes), and warns and returns ``network`` itself where that fails.

    Args:
        network: in eval mode and without hooks, such as ``fused`` makes; some parameters are trained.
        images: (batch, channels, height, width) as it will be called with; other shapes compile anew.

    Taught in notebook 07.
    """
    made: Any = torch.compile(network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        torch.autograd.grad(made(images).float().sum(), trained, allow_unused=True)
    except Exception as error:  # a missing compiler shows in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"compiled=True: PyTorch cannot compile here, its own kernels are used ({reason}); "
            "install a C++ compiler (Debian, Ubuntu: g++ and python3-dev)",
            stacklevel=2,
        )
        return network
    return made
