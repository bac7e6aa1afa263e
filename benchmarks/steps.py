"""The iterations whose cost is measured: of ordinary training, fine-tuning, synthesis and a generator."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import generators, losses, quantizer
from dfqlib.batchnorm import BatchNormProbe, freeze
from dfqlib.models.resnet import CifarResNet
from dfqlib.training import adam, channels_last, mixed_precision
from dfqlib.training.numerics import descend

BATCH = 64
SHAPE = (3, 32, 32)
CPU = torch.device("cpu")
Step = Callable[[], None]


def pictures(device: torch.device, batch: int = BATCH) -> Tensor:
    """A batch of noise, channels last as the network's weights."""
    return torch.randn(batch, *SHAPE, device=device).contiguous(memory_format=torch.channels_last)


def classes(device: torch.device, batch: int = BATCH) -> Tensor:
    """The labels of such a batch."""
    return torch.arange(batch, device=device) % 10


def network(device: torch.device, depth: int = 20) -> nn.Module:
    """A ResNet with its BatchNorm statistics set by noise."""
    model = channels_last(CifarResNet(depth).to(device))
    model(pictures(device))
    return model


def float_training(*, device: torch.device = CPU, bf16: bool = False, compiled: bool = False) -> Step:
    """Ordinary training on labels: forward, backward, SGD, BatchNorm in training mode."""
    model, images, labels = network(device).train(), pictures(device), classes(device)
    sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    trained: Any = model
    if compiled:
        with mixed_precision(device, bf16):
            trained = quantizer.compiled(model, images)

    def step() -> None:
        with mixed_precision(device, bf16):
            logits = trained(images)
        descend(sgd, F.cross_entropy(logits.float(), labels))

    return step


def fine_tuning(
    *, device: torch.device = CPU, bf16: bool = False, compiled: bool = False, naive: bool = False,
    teacher: bool = False, depth: int = 20, batch: int = BATCH,
) -> Step:  # fmt: skip
    """Fine-tuning as in ``express``: W4A4, distillation loss, Adam on weights and step sizes, BatchNorm frozen."""
    source, images = network(device, depth).eval(), pictures(device, batch)
    student = channels_last(quantizer.quantize_layers(source, quantizer.QuantSpec())).requires_grad_(True)
    quantizer.calibrate(student, images, "max")
    freeze(student)
    if naive:
        for _, each in quantizer.quantizers(student):
            each.forward = functools.partial(straight_through, each)  # type: ignore[method-assign]
    groups = quantizer.parameter_groups(student, 1e-5, 1e-6)
    optimizer = torch.optim.Adam(groups) if naive else adam(groups, 1e-5)
    trained, labeling = (student, source) if naive else (quantizer.fused(student), quantizer.fused(source))
    if compiled:
        with mixed_precision(device, bf16):
            trained = quantizer.compiled(trained, images)
    with torch.no_grad():
        logits_of_teacher = source(images)

    def step() -> None:
        with mixed_precision(device, bf16):
            if teacher:
                with torch.no_grad():
                    target = labeling(images)
            else:
                target = logits_of_teacher
            logits = trained(images)
        descend(optimizer, losses.distillation_loss(logits.float(), target.float(), 4.0))

    return step


def straight_through(each: Any, x: Tensor) -> Tensor:
    """A fake quantizer as it is usually written, every operation left to autograd."""
    scaled = torch.clamp(x / quantizer.functions.per_channel(each.step, x), each.qmin, each.qmax)
    return (scaled + (scaled.round() - scaled).detach()) * quantizer.functions.per_channel(each.step, x)


def synthesis_step(
    *, device: torch.device = CPU, bf16: bool = False, contiguous: bool = False, depth: int = 20, batch: int = BATCH
) -> Step:
    """Synthesis as in ``synthesis.from_noise``, under the BatchNorm loss."""
    teacher = network(device, depth).eval().requires_grad_(False)
    images, labels = pictures(device, batch), classes(device, batch)
    if contiguous:
        teacher, images = teacher.to(memory_format=torch.contiguous_format), images.contiguous()  # type: ignore[call-overload]
    pixels = nn.Parameter(images)
    optimizer = adam([pixels], 0.1)

    def step() -> None:
        with BatchNormProbe(teacher) as probe, mixed_precision(device, bf16):
            logits = teacher(pixels)
            loss = losses.bn_norm_loss(probe) + 0.2 * F.cross_entropy(logits, labels)
        descend(optimizer, loss)

    return step


def generator_step(*, device: torch.device = CPU, bf16: bool = False) -> Step:
    """The generator's update in GDFQ: draw images, compute the teacher's loss on them, descend."""
    teacher = network(device).eval().requires_grad_(False)
    generator = generators.ConditionalGenerator(SHAPE, 10).to(device).train()
    channels_last(generator)
    optimizer = adam(generator.parameters(), 1e-3)
    labels = classes(device)

    def step() -> None:
        with BatchNormProbe(teacher) as probe, mixed_precision(device, bf16):
            logits = teacher(generator.sample(BATCH, labels))
            loss = F.cross_entropy(logits, labels) + 0.1 * losses.bn_l2_loss(probe)
        descend(optimizer, loss)

    return step


def waiting(device: torch.device) -> Callable[[], None]:
    """What to call before a clock is read: CUDA computes asynchronously."""
    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
