"""What later papers add to express beside losses: mixed labels, a filter, a perturbation, features to align."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import batchnorm


def superposed_labels(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """Make some labels mixtures of classes, so that images come to lie between them (Qimera, NeurIPS 2021).

    Qimera mixes K label embeddings at the input of a generator, and its label loss has the same mixture as target;
    K is 2 of 10 classes, 10 of 100, with weights softmax(N(0, 1)^K). Without a generator the target is all there is to
    mix: that of the label loss in synthesis. Here each image is mixed or not (there each batch), and the K classes are
    the image's own and others (there drawn with repetition).

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
    """The images a step up the loss, ``x + epsilon sign(grad_x L(x))``: harder for the student (HAST, CVPR 2023).

    Args:
        batch: shape (B, C, H, W), normalized; so is ``epsilon``, a step of a channel is epsilon times its deviation.
        loss: of a batch of images.
        epsilon: 0.01 in HAST.
    """
    batch = batch.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(batch), batch)
    return (batch + epsilon * gradient.sign()).detach()


class Features:
    """What left each BatchNorm layer of a network since last asked, in the order the layers ran.

    HAST aligns what leaves a residual block's last layer; every BatchNorm layer is what any network has.
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
        """The feature maps; empties the list."""
        seen, self._seen = self._seen, []
        return seen
