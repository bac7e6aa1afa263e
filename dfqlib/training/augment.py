"""Random changes of a batch of images, and the low-pass filter of SynQ."""

import math

import torch
from torch import Tensor

__all__ = ["cutmix", "low_pass", "shift_and_flip"]


def shift_and_flip(images: Tensor, shift: int = 2, flip: bool = True) -> Tensor:
    """Shift a batch by up to ``shift`` pixels each way, wrapping around, and mirror it half of the time.

    One draw for the whole batch, as in DeepInversion, so that images do not depend on the position of single pixels.
    """
    down, right = torch.randint(-shift, shift + 1, (2,)).tolist()
    images = images.roll((down, right), (2, 3))
    return images.flip(3) if flip and torch.rand(()) < 0.5 else images


def cutmix(images: Tensor) -> tuple[Tensor, float]:
    """Replace a random box of each image by that of another; the box's area is uniform in 0 ... 1 (CutMix, Yun et al.).

    Returns:
        The images, image n with a box of image -1 - n, and the share of the area that is an image's own.
    """
    height, width = images.shape[2:]
    share = float(torch.rand(())) ** 0.5
    tall, wide = round(height * share), round(width * share)
    top = int(torch.randint(height - tall + 1, ()))
    left = int(torch.randint(width - wide + 1, ()))
    mixed = images.clone()
    mixed[:, :, top : top + tall, left : left + wide] = images.flip(0)[:, :, top : top + tall, left : left + wide]
    return mixed, 1 - tall * wide / (height * width)


def low_pass(images: Tensor, sigma: float) -> Tensor:
    """Blur images by a Gaussian, wrapping around as the random shifts do (SynQ, ICLR 2025).

    SynQ multiplies the spectrum of an image of n pixels a side by exp(-D^2 / (2 D0^2)), D in periods per image and D0
    from 20 to 100. That is a blur by sigma = n / (2 pi D0): at 32 pixels 0.25 for D0 = 20, 0.05 for D0 = 100.

    Args:
        images: shape (N, C, H, W). The mean of an image stays, so it does not matter how they are normalized.
        sigma: standard deviation in pixels; 0 changes nothing.

    Returns:
        Images of the same shape.
    """
    height, width = images.shape[2:]
    down, right = torch.fft.fftfreq(height, device=images.device), torch.fft.rfftfreq(width, device=images.device)
    passed = torch.exp(-2 * (math.pi * sigma) ** 2 * (down.square().unsqueeze(1) + right.square()))
    blurred = torch.fft.irfft2(torch.fft.rfft2(images.float()) * passed, s=(height, width))
    return blurred.to(images.dtype).contiguous(memory_format=torch.channels_last)
