"""What later papers add to express beside losses: mixed labels, a perturbation, features to align."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import batchnorm


def superposed_labels(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """Make some labels mixtures of classes, so that images lie between classes (Qimera, NeurIPS 2021).

    Qimera mixes K label embeddings at the input of a generator, and its label loss has the same mixture as target;
    K is 2 of 10 classes, 10 of 100, with weights softmax(N(0, 1)^K). Here, without a generator, only the target of the
    label loss in synthesis is mixed. Each image is mixed or not (in Qimera each batch), and the K classes are the
    image's own and others (in Qimera drawn with repetition).

    Args:
        labels: classes, shape (N,).
        classes: how many there are; K is a tenth of them, at least 2.
        share: probability of a mixture.
        seed: of the mixtures.

    Returns:
        Probabilities, shape (N, classes).
    """
    draw = torch.Generator().manual_seed(seed)
    count, mixed = len(labels), min(max(2, classes // 10), classes)
    own = labels.cpu().unsqueeze(1)
    parts = torch.rand(count, classes, generator=draw).scatter(1, own, 2.0).topk(mixed).indices  # own first
    weights = F.softmax(torch.randn(count, mixed, generator=draw), dim=1)
    mixture = torch.zeros(count, classes).scatter(1, parts, weights)
    single = F.one_hot(labels.cpu(), classes).float()
    return torch.where(torch.rand(count, 1, generator=draw) < share, mixture, single).to(labels.device)


def perturbed(batch: Tensor, loss: Callable[[Tensor], Tensor], epsilon: float) -> Tensor:
    """The images after a step up the loss, ``x + epsilon sign(grad_x L(x))``, harder for the student (HAST, CVPR 2023).

    Args:
        batch: shape (B, C, H, W), normalized; in pixels the step is epsilon times a channel's standard deviation.
        loss: of a batch of images.
        epsilon: 0.01 in HAST.
    """
    batch = batch.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(batch), batch)
    return (batch + epsilon * gradient.sign()).detach()


class Features:
    """Hooks that keep the outputs of a network's BatchNorm layers, in the order in which the layers ran.

    HAST aligns the outputs of residual blocks; BatchNorm layers exist in other networks too.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = list(batchnorm.layers(network).values())
        self._seen: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "Features":
        self._handles = [layer.register_forward_hook(self._see) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen.append(output)

    def take(self) -> list[Tensor]:
        """The feature maps since the last call."""
        seen, self._seen = self._seen, []
        return seen
