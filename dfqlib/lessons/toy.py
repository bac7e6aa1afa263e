"""Data-free quantization in the plane: points instead of images, so that every stage can be plotted.

Taught in notebook 01.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib import batchnorm
from dfqlib.errors import InputError, NonFiniteError
from dfqlib.losses import bn_l2_loss, distillation_loss
from dfqlib.quantizer import QuantSpec, calibrate, quantize_layers
from dfqlib.training import adam

BATCH = 250
"""Points per iteration, enough for stable statistics of a batch."""

Sampler = Callable[[int], tuple[Tensor, Tensor]]
"""From a count n to points and labels, shapes (n, 2) and (n,)."""


def mlp(layers: int = 3, width: int = 16, classes: int = 2) -> nn.Sequential:
    """A classifier of points in the plane: ``layers`` times Linear, BatchNorm, ReLU, then a linear layer.

    Args:
        layers: hidden layers, 1 to 8, each with one BatchNorm.
        width: units of a hidden layer, 2 or more.
        classes: outputs.

    Raises:
        InputError: ``layers`` or ``width`` is out of range.
    """
    if not 1 <= layers <= 8:
        raise InputError(f"layers={layers} must be from 1 to 8; without one there is no BatchNorm to read")
    if width < 2:
        raise InputError(f"width={width} must be 2 or more, for example 16")
    sizes = [2] + [width] * layers
    hidden = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(sizes)]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], classes))


def fit(network: nn.Module, points: Tensor, labels: Tensor, steps: int = 600) -> nn.Module:
    """Train ``network`` on labeled points with Adam; returns it in eval mode, its weights fixed.

    Args:
        network: changed in place.
        points: shape (n, 2).
        labels: shape (n,).
        steps: batches.
    """

    def loss(_: int) -> Tensor:
        chosen = torch.randint(len(points), (BATCH,))
        return F.cross_entropy(network(points[chosen]), labels[chosen])

    minimize(loss, list(network.train().parameters()), steps, lr=0.01)
    return network.eval().requires_grad_(False)


def minimize(loss: Callable[[int], Tensor], parameters: list[Tensor], steps: int, lr: float) -> list[float]:
    """Minimize ``loss(step)`` by Adam with a cosine schedule; returns the loss of each iteration.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    optimizer = adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    history = []
    for step in range(steps):
        value = loss(step)
        if not torch.isfinite(value):
            raise NonFiniteError(f"the loss is {value.item()} at step {step}: lower the weights of its terms")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        history.append(value.item())
    return history


def statistics_gap(network: nn.Module, points: Tensor) -> float:
    """Distance of the statistics of ``points`` from the stored ones (GDFQ Eq. 5)."""
    with torch.no_grad(), batchnorm.BatchNormProbe(network) as probe:
        network(points)
        return bn_l2_loss(probe).item()


def points_from_statistics(network: nn.Module, start: Tensor, steps: int = 300) -> tuple[Tensor, list[float]]:
    """Move points until their statistics are the stored ones: ZeroQ's idea, in the plane.

    ZeroQ matches each image alone; a point has no width and height to take a variance over, so all points are
    matched together, by the squared distances of GDFQ Eq. 5.

    Args:
        network: classifier with BatchNorm, in eval mode.
        start: where the points begin, shape (n, 2), usually Gaussian noise.
        steps: optimization steps.

    Returns:
        The points, shape (n, 2), and the gap at each step.

    Raises:
        InputError: all points start on one spot, where they have the same gradient and never part.

    Taught in notebook 01.
    """
    if bool((start == start[:1]).all()):
        raise InputError("start has all points on one spot, from which they never part: spread them, noise=1.0")
    points = start.clone().requires_grad_()
    with batchnorm.BatchNormProbe(network) as probe:

        def loss(_: int) -> Tensor:
            network(points)
            return bn_l2_loss(probe)

        history = minimize(loss, [points], steps, lr=0.05)
    return points.detach(), history


class Generator(nn.Module):
    """Generator of points, ``G(z|y)`` of GDFQ: the label's embedding times z, then hidden layers.

    Args:
        classes: number of labels.
        latent: length of the noise z.
        width: units of a hidden layer.
    """

    def __init__(self, classes: int = 2, latent: int = 32, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, latent)
        self.body = nn.Sequential(
            *(nn.Linear(latent, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Linear(width, 2),
        )

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.body(self.embedding(labels) * z)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Points, shape (count, 2), and their balanced labels, shape (count,)."""
        labels = torch.arange(count) % self.embedding.num_embeddings
        return self(torch.randn(count, self.embedding.embedding_dim), labels), labels

    @torch.no_grad()
    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """``sample`` in eval mode and without gradients."""
        return self.eval().sample(count)


def train_generator(
    network: nn.Module, beta: float = 0.1, alpha: float = 1.0, steps: int = 600
) -> tuple[Generator, dict[str, list[float]]]:
    """Train a generator against a fixed network: its labels (GDFQ Eq. 4) and its statistics (GDFQ Eq. 5).

    The loss is ``alpha * CE(T(G(z|y)), y) + beta * BNS`` (GDFQ Eq. 9, where alpha is 1).

    Args:
        network: the teacher T, in eval mode with fixed weights.
        beta: weight of the statistics, 0 or more; 0.1 in GDFQ.
        alpha: weight of the labels, 0 or more.
        steps: batches.

    Returns:
        The generator and the histories of both terms, "label" and "statistics".

    Raises:
        InputError: a weight is negative, or both are 0.

    Taught in notebook 01.
    """
    if min(alpha, beta) < 0 or alpha == beta == 0:
        raise InputError(f"alpha={alpha}, beta={beta}: neither may be negative and one must be above 0")
    generator = Generator()
    history: dict[str, list[float]] = {"label": [], "statistics": []}
    with batchnorm.BatchNormProbe(network) as probe:

        def loss(_: int) -> Tensor:
            points, labels = generator.sample(BATCH)
            label = F.cross_entropy(network(points), labels)
            statistics = bn_l2_loss(probe)
            history["label"].append(label.item())
            history["statistics"].append(statistics.item())
            return alpha * label + beta * statistics

        minimize(loss, list(generator.parameters()), steps, lr=0.005)
    return generator, history


def quantize(network: nn.Module, bits: int, points: Tensor) -> nn.Module:
    """A copy with every layer in ``bits`` bits (GDFQ Eq. 6), ranges calibrated on ``points``, BatchNorm fixed."""
    spec = QuantSpec(bits, bits, edge_bits=bits, granularity="channel", scheme="affine", step="fixed")
    student = quantize_layers(network, spec)
    calibrate(student, points)
    batchnorm.freeze(student)
    return student.requires_grad_(True)


def fine_tune(
    student: nn.Module, teacher: nn.Module, sample: Sampler, gamma: float = 1.0, steps: int = 200
) -> nn.Module:
    """Fit the student to labels (GDFQ Eq. 7) and the teacher's soft outputs (GDFQ Eq. 8) on sampled points.

    The loss is ``CE(Q(x), y) + gamma * KD`` with temperature 20 (GDFQ Eq. 10).

    Args:
        student: quantized network, changed in place.
        teacher: the network it came from.
        sample: gives points and labels.
        gamma: weight of the soft outputs, 0 or more.
        steps: batches.

    Taught in notebook 01.
    """
    if gamma < 0:
        raise InputError(f"gamma={gamma} must be 0 or more; 1 is GDFQ's")

    def loss(_: int) -> Tensor:
        with torch.no_grad():
            points, labels = sample(BATCH)
            soft = teacher(points)
        output = student(points)
        return F.cross_entropy(output, labels) + gamma * distillation_loss(output, soft, temperature=20.0)

    minimize(loss, [p for p in student.parameters() if p.requires_grad], steps, lr=0.01)
    return student.eval()


def from_pool(points: Tensor, labels: Tensor) -> Sampler:
    """A sampler that draws from fixed points with replacement."""

    def sample(count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(points), (count,))
        return points[chosen], labels[chosen]

    return sample


@torch.no_grad()
def accuracy(network: nn.Module, points: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    return 100 * (network(points).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def unsure_share(network: nn.Module, points: Tensor, below: float = 0.9) -> float:
    """Percent of points whose most likely class has a probability under ``below``."""
    return 100 * (network(points).softmax(1).amax(1) < below).float().mean().item()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Energy distance ``2 E|a - b| - E|a - a'| - E|b - b'|`` of two sets of points; 0 for equal distributions.

    Args:
        a: shape (n, 2).
        b: shape (m, 2).
    """
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()
