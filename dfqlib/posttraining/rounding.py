"""AdaRound: round each weight up or down so that its layer's output stays, not to the nearest.

Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (ICML 2020). Layer after layer, a variable V
per weight is trained on a few hundred images: ``W~ = s * clip(floor(W / s) + h(V), n, p)`` with the rectified sigmoid
``h(V) = clamp(sigmoid(V) * 1.2 - 0.1, 0, 1)`` (Eq. 22, 23), against the output of the floating-point layer, with a
regularizer that drives each h(V) to 0 or 1 (Eq. 24). Each layer sees the input that the quantized layers before it make
and is compared after its activation (Eq. 25).

Taught in notebook 09.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfqlib.errors import InputError
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
    """The V with ``h(V) = h`` for h in [0, 1]: where training starts from, so that W~ = W."""
    high, low = STRETCH
    return -torch.log((high - low) / (h - low) - 1)


def rounding_regularizer(v: Tensor, beta: float) -> Tensor:
    """``sum 1 - |2 h(V) - 1|^beta`` (Eq. 24): 0 when every h(V) is 0 or 1; a smaller beta pushes harder.

    Taught in notebook 09.
    """
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def annealed_beta(share: float, start: float = 20.0, end: float = 2.0, warm_up: float = 0.2) -> float:
    """beta after ``share`` of the steps, falling from ``start`` to ``end`` on half a cosine after the warm-up."""
    progress = max(0.0, (share - warm_up) / (1 - warm_up))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def soft_weights(weight: Tensor, v: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    """``s * clip(floor(W / s) + h(V), n, p)`` (Eq. 22), differentiable in ``v``."""
    return ((weight / step).floor() + rectified_sigmoid(v)).clamp(qmin, qmax) * step


def require_steps(spec: QuantSpec) -> None:
    """Raise InputError unless weights of ``spec`` have the step on whose grid AdaRound chooses."""
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
    """Choose the rounding of every layer's weights, in place; afterwards they lie on their grids.

    Args:
        student: the calibrated network of ``quantizer.quantize_layers``, weights with steps.
        teacher: what it was made of, as a graph (``graph.trace(model)[0]``, ``folding.fold(model).network``).
        images: (N, C, H, W), synthetic ones do; the layers' inputs for all of them are held in memory.
        steps: Adam steps per layer; the paper takes 10,000.
        batch: images per step.
        lr: learning rate of V.
        weight: lambda of the regularizer, 0.01.
        beta: first and last exponent of the regularizer.
        warm_up: share of the steps without the regularizer.
        session: progress, history and resuming; None for a silent run that leaves the random state as it was.

    Returns:
        By layer, the mean squared error of its output with the weights rounded to nearest, and with those chosen: the
        trained rounding, or to nearest where a schedule too short did not beat it.

    Raises:
        InputError: no images, or weights that have two bounds instead of a step.

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
            target = _outputs(teacher, originals[name], images)
            inputs = _inputs(student, layer, images)
            errors[name] = _round_layer(
                run, layer, originals[name].module.weight, inputs, target, steps=steps, batch=batch, lr=lr,
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
        # Summed over channels, averaged over images and positions: the scale for which 0.01 is meant.
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
        codes = (original / step_size).floor() + (rectified_sigmoid(rounding.v) >= 0.5)
        rounded = codes.clamp(quantizer.qmin, quantizer.qmax) * step_size
        nearest = quantizer(original)
        errors = [float((forward(inputs, w) - target).square().mean()) for w in (nearest, rounded)]
        layer.module.weight.copy_(rounded if errors[1] <= errors[0] else nearest)
    return errors[0], min(errors)


def _after(layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    """(inputs, weights) to what the layer puts out after its BatchNorm and its ReLU, where it has them."""
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
    found: list[Any] = []
    handle = layer.module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        network(images)
    finally:
        handle.remove()
    return found[0]


def _outputs(network: nn.Module, layer: Layer, images: Tensor) -> Tensor:
    with torch.no_grad():
        return _after(layer)(_inputs(network, layer, images), layer.module.weight)
