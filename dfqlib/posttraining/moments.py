"""Distributions of a network's tensors without data: clipped normal variables, propagated through its graph.

A BatchNorm layer outputs channels with mean beta and standard deviation ``|gamma|``, which Nagel et al. (Data-Free
Quantization through Weight Equalization and Bias Correction, ICCV 2019) model as Gaussian. This gives the mean after a
ReLU in closed form (appendix C) and activation ranges of beta +- 6 gamma. Residual sums, which the paper does not
discuss, are taken as sums of independent variables: means and variances add.

Taught in notebook 02.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.special import ndtr

from dfqlib.network import graph, kinds
from dfqlib.quantizer import AffineQuantizer, StepQuantizer, quantizers

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and standard deviation, (channels,) each, of a module's output, by the module's name."""


@dataclass(frozen=True, eq=False)
class ClippedNormal:
    """Independent normal variables, one per channel, clipped to an interval each; all fields are (channels,).

    Attributes:
        mean: before clipping.
        std: before clipping, 0 for a constant.
        low: lower bound, may be -inf.
        high: upper bound, may be inf.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def free(cls, mean: Tensor, std: Tensor) -> "ClippedNormal":
        """Variables without bounds."""
        unbounded = torch.full_like(mean, math.inf, dtype=torch.float64)
        return cls(mean.double(), std.double(), -unbounded, unbounded)

    def clip(self, low: float, high: float) -> "ClippedNormal":
        """The variables after a clamp: ``clip(0, inf)`` is a ReLU, ``clip(0, 6)`` a ReLU6."""
        return dataclasses.replace(self, low=self.low.clamp(low, high), high=self.high.clamp(low, high))

    def expectation(self) -> Tensor:
        """E[x] (Nagel et al. 2019, appendix C): for a ReLU ``std * phi(mean/std) + mean * Phi(mean/std)``."""
        return self._moments()[0]

    def variance(self) -> Tensor:
        """E[x^2] - E[x]^2."""
        first, second = self._moments()
        return (second - first.square()).clamp_(min=0)

    def range(self, deviations: float) -> tuple[float, float]:
        """Smallest ``mean - n std`` and largest ``mean + n std`` of all channels, within the bounds."""
        low = torch.clamp(self.mean - deviations * self.std, self.low, self.high)
        high = torch.clamp(self.mean + deviations * self.std, self.low, self.high)
        return float(low.min()), float(high.max())

    def _moments(self) -> tuple[Tensor, Tensor]:
        std = self.std.clamp(min=1e-12)
        alpha, beta = (self.low - self.mean) / std, (self.high - self.mean) / std
        below, above = _times(self.low, ndtr(alpha)), _times(self.high, ndtr(-beta))
        inside, drop = ndtr(beta) - ndtr(alpha), _density(alpha) - _density(beta)
        first = below + above + self.mean * inside + std * drop
        tails = _times(alpha, _density(alpha)) - _times(beta, _density(beta))
        second = (
            _times(self.low, below)
            + _times(self.high, above)
            + (self.mean.square() + std.square()) * inside
            + 2 * self.mean * std * drop
            + std.square() * tails
        )
        return first, second


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _times(bound: Tensor, weight: Tensor) -> Tensor:
    """``bound * weight``, 0 at an infinite bound."""
    return torch.where(torch.isinf(bound), 0.0, bound * weight)


def propagate(network: fx.GraphModule, statistics: Statistics) -> dict[fx.Node, ClippedNormal]:
    """The distributions of the tensors of ``network`` that follow from ``statistics``.

    Known are the outputs of the modules in ``statistics``, and those of activations, average pooling, sums, padding
    and concatenation of known tensors. Outputs of layers without BatchNorm and of max pooling are unknown and absent.

    Args:
        network: in floating point or with quantizers, whose error is neglected.
        statistics: such as ``equalization.Folded.statistics``.

    Taught in notebook 02.
    """
    known: dict[fx.Node, ClippedNormal] = {}
    for node in network.graph.nodes:
        found = _propagate(node, known, statistics)
        if found is not None:
            known[node] = found
    return known


def _propagate(node: fx.Node, known: Mapping[fx.Node, ClippedNormal], statistics: Statistics) -> ClippedNormal | None:
    if node.op == "call_module" and node.target in statistics:
        return ClippedNormal.free(*statistics[str(node.target)])
    kind, sources = graph.operation(node), [source for source in node.all_input_nodes if source in known]
    if not sources or kind is None:
        return None
    first = known[sources[0]]
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if kind in kinds.RELUS:
        return first.clip(0.0, 6.0 if kind in kinds.RELU6 else math.inf)
    if kind in kinds.VIEWS or kind in (StepQuantizer, AffineQuantizer):
        return first
    if kind in kinds.AVERAGES:
        return dataclasses.replace(first, mean=first.expectation(), std=first.variance().sqrt())
    if kind in kinds.ADDS and len(node.args) == 2 and len(tensors) == 2 and all(term in known for term in tensors):
        return _sum(*(known[term] for term in tensors))
    if kind in kinds.CATS and len(sources) == len(node.all_input_nodes):
        joined: Any = node.args[0]  # all_input_nodes would list a repeated tensor once
        parts = [known[part] for part in joined]
        return _by_field(lambda *fields: torch.cat(fields), *parts)
    if kind in (operator.getitem, F.pad):
        return _by_field(lambda field: node.target(field, *node.args[1:], **node.kwargs), first)  # type: ignore[operator]
    return None


def _sum(a: ClippedNormal, b: ClippedNormal) -> ClippedNormal:
    std = (a.variance() + b.variance()).sqrt()
    return ClippedNormal(a.expectation() + b.expectation(), std, a.low + b.low, a.high + b.high)


def _by_field(operation: Callable[..., Any], *values: ClippedNormal) -> ClippedNormal | None:
    """Apply an operation that selects or joins channels to each field, viewed as (1, channels, 1, 1) or joined."""
    names = [item.name for item in dataclasses.fields(ClippedNormal)]
    if len(values) > 1:
        return ClippedNormal(**{name: operation(*(getattr(value, name) for value in values)) for name in names})
    moved = {name: operation(getattr(values[0], name).view(1, -1, 1, 1)) for name in names}
    whole = all(isinstance(field, Tensor) and field.ndim == 4 and field.shape[2:] == (1, 1) for field in moved.values())
    return ClippedNormal(**{name: field.flatten() for name, field in moved.items()}) if whole else None


@torch.no_grad()
def set_ranges(network: fx.GraphModule, statistics: Statistics, deviations: float = 6.0) -> list[str]:
    """Set the ranges of activation quantizers to beta -+ ``deviations`` gamma (Nagel et al. 2019, section 5), in place.

    Args:
        network: from ``quantizer.quantize_layers``.
        statistics: of its modules.
        deviations: 6 in the paper, for 8 bits; fewer bits need fewer.

    Returns:
        Names of the activation quantizers that were not set, because the distribution of their input is unknown.

    Taught in notebook 09.
    """
    known, left = propagate(network, statistics), []
    modules = dict(quantizers(network))
    for node in network.graph.nodes:
        if str(node.target) not in modules or node.op != "call_module":
            continue
        low, high = known[node].range(deviations) if node in known else (0.0, 0.0)
        if not high > low:
            left.append(str(node.target))
            continue
        quantizer = modules[str(node.target)]
        if isinstance(quantizer, StepQuantizer):
            quantizer.step.fill_(max(high, -low) / quantizer.qmax)
        else:
            quantizer.low.fill_(low)
            quantizer.high.fill_(high)
    return left
