"""Adversarial distillation in one dimension: AKD's min-max problem, small enough to plot and to repeat many times.

The teacher is a curve, the logit of class 1 at each position x. A student is a sum of Gaussian bumps with trained
heights, so that learning at one position does not change another. A generator is a Gaussian of trained mean and fixed
width: like a network of low capacity, it covers one part of the line at a time.

Taught in notebook 08.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.recipes import akd

CENTRES = torch.linspace(-4, 4, 33)
"""Centers of a student's bumps."""
GRID = torch.linspace(-4, 4, 161)
"""Positions at which divergences are recorded."""
SHARE = torch.softmax(-(GRID**2) / 2, 0)
"""Share of the real data at each position of ``GRID``: standard normal, as a BatchNorm would store it."""
STUDENT_MOVES = 3


@dataclass(frozen=True)
class Record:
    """Generators and students after each round.

    Attributes:
        places: centers of the generators, shape (rounds, games, generators).
        gaps: divergence of the first student from the teacher along ``GRID``, shape (rounds, games, positions).
    """

    places: Tensor
    gaps: Tensor

    @property
    def real_gap(self) -> Tensor:
        """Mean divergence on the real data, shape (rounds, games)."""
        return self.gaps @ SHARE


def curve(x: Tensor) -> Tensor:
    """The teacher's logit of class 1, any shape."""
    return 3 * torch.sin(3 * x)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(T || S)`` of two classes from the logits of one of them, elementwise."""
    p = teacher.sigmoid()
    sure, not_sure = F.logsigmoid(teacher) - F.logsigmoid(student), F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return p * sure + (1 - p) * not_sure


def prior(x: Tensor) -> Tensor:
    """AKD's L_psi of points (..., n) for stored mean 0 and variance 1, shape (...)."""
    mean, var = x.mean(-1), x.var(-1, unbiased=False)
    p = curve(x).sigmoid()
    return (var + mean**2) / 2 - var.log() / 2 - 0.5 + _entropy(p).mean(-1) - _entropy(p.mean(-1))


def play(
    generators: int = 1, students: int = 1, alpha: float = 0.1, *, width: float = 0.3, rounds: int = 60,
    games: int = 20, points: int = 24, seed: int = 0,
) -> Record:  # fmt: skip
    """Many independent games at once, each of some generators against some students.

    A round is one move of every generator, up the mean gap of the students less ``alpha`` L_psi, and three of every
    student, down the mean gap over the generators. The points are shared out among the generators, so that a student
    sees as many of them whatever the number of generators.

    Args:
        generators: G, how many blobs, 1 or more.
        students: S, how many, 1 or more.
        alpha: weight of ``prior``, 0 or more.
        width: standard deviation of a blob.
        rounds: see above.
        games: repetitions, each with its own start.
        points: of each move of a student, in all.
        seed: of the starts and the points.

    Raises:
        InputError: no generator, no student, or a negative alpha.

    Taught in notebook 08.
    """
    akd.Settings(generators=generators, students=students, alpha=alpha, warm_up_epochs=0)  # its checks, its words
    rng = torch.Generator().manual_seed(seed)
    places = torch.randn(games, generators, generator=rng).requires_grad_()
    heights = (0.3 * torch.randn(games, students, len(CENTRES), generator=rng)).requires_grad_()
    climb, descend = torch.optim.Adam([places], 0.15), torch.optim.Adam([heights], 0.2)
    share = max(points // generators, 2)
    history = []

    def draw() -> Tensor:
        return places[..., None] + width * torch.randn(games, generators, share, generator=rng)

    for _ in range(rounds):
        x = draw()
        _step(climb, (alpha * prior(x) - _gap(x, heights.detach()).mean(2)).sum())
        for _ in range(STUDENT_MOVES):
            _step(descend, _gap(draw().detach(), heights).mean(1).sum())
        with torch.no_grad():
            gaps = divergence(heights[:, 0] @ _bumps(GRID).T, curve(GRID))
            history.append((places.detach().clone(), gaps))
    return Record(torch.stack([place for place, _ in history]), torch.stack([gaps for _, gaps in history]))


def _bumps(x: Tensor) -> Tensor:
    return torch.exp(-8 * (x[..., None] - CENTRES) ** 2)


def _gap(x: Tensor, heights: Tensor) -> Tensor:
    """Mean divergence of each generator and student: (games, generators, n) to (games, generators, students)."""
    answers = torch.einsum("gknf,gsf->gksn", _bumps(x), heights)
    return divergence(answers, curve(x)[:, :, None]).mean(3)


def _entropy(p: Tensor) -> Tensor:
    """Entropy of two classes with probabilities p and 1 - p, in nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values, shape (n,), n at least 2."""
    return float(values.std() / math.sqrt(len(values)))
