"""Synthesis of images: pixels optimized by the teacher's losses, or drawn from a trained generator.

Taught in notebook 03.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from dfqlib import training
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.generators import Generator
from dfqlib.training import Session, mixed_precision
from dfqlib.training.session import LOG_EVERY, Stateful

Losses = Mapping[str, Tensor]
Objective = Callable[[Tensor, Tensor, BatchNormProbe, Tensor], Losses]
"""(images, the teacher's logits, its probe, labels) to losses by name, of which "loss" is minimized."""
Schedule = LRScheduler | ReduceLROnPlateau
MakeOptimizer = Callable[[list[nn.Parameter]], tuple[Optimizer, Schedule]]

PLATEAU = 2 * LOG_EVERY
"""Iterations over which a loss is averaged to decide whether it still falls."""


Parametrization = Literal["pixels", "fourier"]


class Pixels(nn.Module):
    """Images that are optimized pixel by pixel, from noise of shape (N, channels, height, width)."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(noise.contiguous(memory_format=torch.channels_last))

    def forward(self) -> Tensor:
        """The images."""
        return self.values


class Fourier(nn.Module):
    """Images that are optimized by their Fourier coefficients (Olah et al., *Feature visualization*, Distill 2017).

    Computes ``x = irfft2(p s)`` for each channel, where ``s`` is 1 / frequency, scaled to root mean square 1; the
    frequency is at least one period per image. One update of Adam then changes coarse shapes more than fine ones, in
    the proportion of natural images, where an update of pixels changes all scales alike.

    Args:
        noise: the images that ``p`` are the coefficients of, shape (N, channels, height, width).
    """

    scale: Tensor

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        height, width = self.size = (noise.shape[2], noise.shape[3])
        rows, columns = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
        frequency = (rows[:, None].square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
        scale = 1 / frequency
        self.register_buffer("scale", (scale / scale.square().mean().sqrt()).to(noise.device))
        self.values = nn.Parameter(torch.view_as_real(torch.fft.rfft2(noise, norm="ortho")).contiguous())

    def forward(self) -> Tensor:
        """The images."""
        images = torch.fft.irfft2(torch.view_as_complex(self.values) * self.scale, s=self.size, norm="ortho")
        return images.contiguous(memory_format=torch.channels_last)


def from_noise(
    teacher: nn.Module,
    labels: Tensor,
    image_shape: tuple[int, int, int],
    objective: Objective,
    optimizer: MakeOptimizer,
    steps: int,
    session: Session,
    *,
    batch: int = 256,
    first_batch: int = 0,
    augment: Callable[[Tensor], Tensor] | None = None,
    bf16: bool = False,
    plateau: float = 0.0,
    parametrization: Parametrization = "pixels",
) -> Tensor:
    """Optimize Gaussian noise into one image per label.

    Args:
        teacher: the trained network, frozen and in eval mode, its BatchNorm layers intact.
        labels: target class of each image, shape (N,); an objective may ignore them.
        image_shape: (channels, height, width).
        objective: losses of the images.
        optimizer: makes the optimizer of a batch's pixels and its learning rate schedule.
        steps: iterations for each batch.
        session: progress, history, resume file.
        batch: images optimized together; BatchNorm statistics are matched over the batch.
        first_batch: number of the first batch, which seeds its noise: a second call in a run continues the count.
        augment: random change of the images before the teacher runs, such as ``shift_and_flip``.
        bf16: run the teacher in bfloat16 where the processor supports it.
        plateau: end a batch early, in the last quarter of its iterations, when its loss falls by less than this
            fraction within ``PLATEAU`` iterations; 0 never ends early.
        parametrization: what is optimized, the images' "pixels" or their scaled coefficients, "fourier".

    Returns:
        Images in the teacher's normalized space, shape (N, channels, height, width).

    Taught in notebook 03.
    """
    parts = labels.split(batch)
    made = []
    last = first_batch + len(parts)
    for index, part in enumerate(parts, first_batch):
        phase = "synthesis" if last == 1 else f"synthesis {index + 1}/{last}"
        session.reseed(f"noise {index}")
        noise = torch.randn(len(part), *image_shape).to(part.device)
        canvas = Pixels(noise) if parametrization == "pixels" else Fourier(noise)
        adjust, schedule = optimizer([canvas.values])
        with BatchNormProbe(teacher) as probe:

            def losses(part: Tensor = part, canvas: Pixels | Fourier = canvas, probe: BatchNormProbe = probe) -> Losses:
                images = canvas() if augment is None else augment(canvas())
                with mixed_precision(part.device, bf16):
                    return objective(images, teacher(images), probe, part)

            state: dict[str, Stateful] = {"images": canvas, "optimizer": adjust, "schedule": schedule}
            stop = partial(_is_flat, plateau, steps) if plateau else None
            session.loop(phase, steps, partial(_descend, losses, adjust, schedule), state, finished=stop)
        made.append(canvas().detach())
    return torch.cat(made)


def _is_flat(share: float, steps: int, rows: list[dict[str, Any]]) -> bool:
    """Whether the mean loss of the last ``PLATEAU`` iterations is at least ``1 - share`` of that of the ones before.

    Checked in the last quarter only; at the earlier, higher learning rates a plateau is often temporary.
    """
    if rows[-1]["step"] < 0.75 * steps:
        return False
    count = PLATEAU // LOG_EVERY
    values = [row["loss"] for row in rows]
    return len(values) >= 2 * count and sum(values[-count:]) > (1 - share) * sum(values[-2 * count : -count])


def _descend(losses: Callable[[], Losses], optimizer: Optimizer, schedule: Schedule, _: int) -> Losses:
    values = losses()
    optimizer.zero_grad(set_to_none=True)
    values["loss"].backward()
    optimizer.step()
    if isinstance(schedule, ReduceLROnPlateau):
        schedule.step(values["loss"].detach())
    else:
        schedule.step()
    return values


def adam(lr: float, cosine_steps: int | None = None) -> MakeOptimizer:
    """Adam with a learning rate that falls to 0 along a cosine of ``cosine_steps``, or stays constant without them."""

    def make(pixels: list[nn.Parameter]) -> tuple[Optimizer, Schedule]:
        chosen = training.adam(pixels, lr)
        if cosine_steps is None:
            return chosen, ConstantLR(chosen, factor=1.0)
        return chosen, CosineAnnealingLR(chosen, max(cosine_steps, 1))

    return make


def adam_on_plateaus(lr: float, patience: int) -> MakeOptimizer:
    """Adam whose learning rate is divided by ten when the loss has not improved for ``patience`` steps (ZeroQ)."""

    def make(pixels: list[nn.Parameter]) -> tuple[Optimizer, Schedule]:
        chosen = training.adam(pixels, lr)
        return chosen, ReduceLROnPlateau(chosen, patience=patience)

    return make


def balanced_labels(count: int, classes: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` labels that cycle through the classes, shape (count,)."""
    return torch.arange(count, device=device) % classes


@torch.no_grad()
def from_generator(generator: Generator, count: int, *, batch: int = 256) -> tuple[Tensor, Tensor | None]:
    """Draw images from a generator in eval mode, with balanced labels where it takes labels.

    Returns:
        Images, shape (count, channels, height, width), and their labels, or None for an unconditional generator.

    Taught in notebook 04.
    """
    generator.eval()
    device = next(generator.parameters()).device
    labels = None if generator.classes is None else balanced_labels(count, generator.classes, device)
    parts = [
        generator.sample(len(rows), None if labels is None else labels[rows])
        for rows in torch.arange(count, device=device).split(batch)
    ]
    return torch.cat(parts), labels
