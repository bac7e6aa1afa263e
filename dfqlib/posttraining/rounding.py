"""AdaRound: learn for each weight whether to round up or down, to preserve the output of its layer.

Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (ICML 2020). Layer by layer, a variable V per
weight is trained on a few hundred images: ``W~ = s * clip(floor(W / s) + h(V), n, p)`` with the rectified sigmoid
``h(V) = clamp(sigmoid(V) * 1.2 - 0.1, 0, 1)`` (Eq. 22, 23) minimizes the error of the layer's output, and a regularizer
drives each h(V) to 0 or 1 (Eq. 24). The layer's input is that of the quantized network, and outputs are compared after
the activation (Eq. 25).

Taught in notebook 09.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from dfqlib.errors import InputError
from dfqlib.evaluation.metrics import recording
from dfqlib.network import graph, kinds
from dfqlib.network.convolution import convolve
from dfqlib.network.folding import Layer, find_layers, per_channel
from dfqlib.quantizer import StepQuantizer
from dfqlib.spec import QuantSpec
from dfqlib.training import Session, adam

STRETCH = 1.1, -0.1
"""zeta and gamma of Eq. 23: the sigmoid is stretched so that h reaches 0 and 1 at finite V."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(V) = clamp(sigmoid(V) * 1.2 - 0.1, 0, 1)`` (Eq. 23), shaped like ``v``.

    Taught in notebook 09.
    """
    high, low = STRETCH
    return (v.sigmoid() * (high - low) + low).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The V with ``h(V) = h`` for h in [0, 1], the initial value with which W~ = W."""
    high, low = STRETCH
    return -torch.log((high - low) / (h - low) - 1)


def rounding_regularizer(v: Tensor, beta: float) -> Tensor:
    """``sum 1 - |2 h(V) - 1|^beta`` (Eq. 24): 0 when every h(V) is 0 or 1; stronger for a smaller beta.

    Taught in notebook 09.
    """
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def annealed_beta(share: float, start: float = 20.0, end: float = 2.0, warm_up: float = 0.2) -> float:
    """beta after ``share`` of the iterations: from ``start`` to ``end`` along half a cosine after the warm-up."""
    progress = max(0.0, (share - warm_up) / (1 - warm_up))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def soft_weights(weight: Tensor, v: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    """``s * clip(floor(W / s) + h(V), n, p)`` (Eq. 22), differentiable in ``v``."""
    return ((weight / step).floor() + rectified_sigmoid(v)).clamp(qmin, qmax) * step


def require_steps(spec: QuantSpec) -> None:
    """Raise InputError unless ``spec`` gives weights a step size, which AdaRound needs."""
    if spec.scheme != "symmetric":
        raise InputError(f'scheme="{spec.scheme}": AdaRound needs a step per weight; take scheme="symmetric"')


class _Rounding(nn.Module):
    """V of one layer."""

    def __init__(self, weight: Tensor, step: Tensor) -> None:
        super().__init__()
        scaled = weight / step
        self.v = nn.Parameter(inverse_rectified_sigmoid(scaled - scaled.floor()))


def adaround(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    images: Tensor,
    *,
    steps: int = 1000,
    batch: int = 32,
    lr: float = 1e-2,
    weight: float = 0.01,
    beta: tuple[float, float] = (20.0, 2.0),
    warm_up: float = 0.2,
    session: Session | None = None,
) -> dict[str, tuple[float, float]]:
    """Learn the rounding of every layer's weights and apply it, in place.

    Args:
        student: the calibrated network of ``quantizer.quantize_layers``, its weights with step sizes.
        teacher: the graph of the network before quantization (of ``graph.trace`` or ``folding.fold``).
        images: (N, C, H, W), synthetic images suffice; the inputs of a layer for all of them are held in memory.
        steps: Adam iterations per layer; 10,000 in the paper.
        batch: images per iteration.
        lr: learning rate of V.
        weight: lambda of the regularizer; 0.01 in the paper.
        beta: first and last exponent of the regularizer.
        warm_up: share of the iterations without the regularizer.
        session: progress, history and resuming; None runs silently and restores the random state.

    Returns:
        By layer, the mean squared error of its output with weights rounded to nearest, and with the rounding chosen:
        the learned one, or to nearest where that is better.

    Raises:
        InputError: no images, or weights with two bounds instead of a step size.

    Taught in notebook 09.
    """
    if len(images) == 0:
        raise InputError("images is empty: give the images to reconstruct each layer's output on")
    layers, originals = find_layers(student), find_layers(teacher)
    for name, layer in layers.items():
        if not isinstance(layer.module.weight_quantizer, StepQuantizer):
            raise InputError(f'{name}: AdaRound needs a step per weight; quantize with QuantSpec(scheme="symmetric")')
    run = session or Session(progress=False)
    errors = {}
    with torch.random.fork_rng(devices=[], enabled=session is None):
        for name, layer in layers.items():
            original = originals[name]
            weights = original.module.weight
            with torch.no_grad():
                target = _after(original)(_inputs(teacher, original, images), weights)
            errors[name] = _round_layer(
                run, layer, weights, _inputs(student, layer, images), target, steps=steps, batch=batch, lr=lr,
                weight=weight, beta=beta, warm_up=warm_up,
            )  # fmt: skip
    return errors


def _round_layer(
    session: Session, layer: Layer, original: Tensor, inputs: Tensor, target: Tensor, *, steps: int, batch: int,
    lr: float, weight: float, beta: tuple[float, float], warm_up: float,
) -> tuple[float, float]:  # fmt: skip
    quantizer, forward = layer.module.weight_quantizer, _after(layer)
    step_size = per_channel(quantizer.step.detach(), original)
    rounding = _Rounding(original.detach(), step_size)
    optimizer = adam(rounding.parameters(), lr)

    def soft() -> Tensor:
        return soft_weights(original, rounding.v, step_size, quantizer.qmin, quantizer.qmax)

    def step(index: int) -> dict[str, Tensor]:
        chosen = torch.randint(len(inputs), (min(batch, len(inputs)),))
        difference = forward(inputs[chosen], soft()) - target[chosen]
        # Summed over channels, averaged over images and positions, the scale that weight=0.01 assumes.
        error = difference.square().sum(1).mean()
        share = index / steps
        total = error
        if share >= warm_up:
            total = error + weight * rounding_regularizer(rounding.v, annealed_beta(share, *beta, warm_up))
        optimizer.zero_grad(set_to_none=True)
        total.backward(inputs=[rounding.v])
        optimizer.step()
        return {"error": error}

    session.loop(f"rounding {layer.name}", steps, step, {"rounding": rounding, "optimizer": optimizer})
    with torch.no_grad():
        values = (original / step_size).floor() + (rectified_sigmoid(rounding.v) >= 0.5)
        rounded = values.clamp(quantizer.qmin, quantizer.qmax) * step_size
        nearest = quantizer(original)
        errors = [float((forward(inputs, w) - target).square().mean()) for w in (nearest, rounded)]
        layer.module.weight.copy_(rounded if errors[1] <= errors[0] else nearest)
    return errors[0], min(errors)


def _after(layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (inputs, weights): the layer's output after its BatchNorm and ReLU, if it has them."""
    relu = _relu(layer)

    def forward(inputs: Tensor, weight: Tensor) -> Tensor:
        module = layer.module
        if isinstance(module, nn.Conv2d):
            out = convolve(module, inputs, weight, module.bias)
        else:
            out = nn.functional.linear(inputs, weight, module.bias)
        if layer.norm is not None:
            out = layer.norm(out)
        return out if relu is None else relu(out)

    return forward


def _relu(layer: Layer) -> Callable[[Tensor], Tensor] | None:
    users = list(layer.output.users)
    if len(users) != 1 or graph.operation(users[0]) not in kinds.RELUS:
        return None
    return nn.functional.relu6 if graph.operation(users[0]) in kinds.RELU6 else nn.functional.relu


@torch.no_grad()
def _inputs(network: nn.Module, layer: Layer, images: Tensor) -> Tensor:
    found: list[Tensor] = []
    with recording({layer.name: layer.module}, lambda _name, x, _output: found.append(x)):
        network(images)
    return found[0]
