"""Where bits are lost, and what to try next.

Taught in notebook 11.
"""

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dfqlib.errors import InputError
from dfqlib.evaluation.metrics import agreement, sqnr
from dfqlib.network.inference import Batches, as_images, predict
from dfqlib.quantizer import Quantizer, StepQuantizer, quantizers
from dfqlib.quantizer.plain import float_network

POOR_SQNR = 10.0
"""Decibels below which a layer's output is more noise than its next layer can use."""
MUCH_CLIPPED = 0.05
"""Share of a tensor beyond its range from which the range is the likely culprit."""
DOMINATED = 10.0
"""Decibels that a layer's median channel may lie below the layer as a whole before a few channels set its range."""
POOR_AGREEMENT = 90.0
"""Percent of the synthetic images below which the student has not even learned those."""


class Run(Protocol):
    """What ``dfqlib.quantize`` returned, as far as it is looked at."""

    model: nn.Module
    images: Tensor
    history: list[dict[str, Any]]
    calibrated: nn.Module | None
    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found.

    Attributes:
        sqnr: signal to quantization noise of each layer's output in decibels, against the teacher.
        own_sqnr: the same when the layer alone is quantized: what its weights add, not what it inherits.
        channel_sqnr: of that, the median over the layer's channels: far below ``own_sqnr`` where a few large channels
            have the range for themselves.
        clipped: share of each activation beyond the range of its quantizer.
        dead: number of channels of each BatchNorm that the next layer sees as constant.
        steps: by quantizer, its step after fine-tuning over its step after calibration.
        step_history: the same at each look while it was trained, from 1 at the start.
        agreement: percent of the synthetic images on which model and teacher choose the same class.
        calibrated_agreement: the same before fine-tuning; None when that network was not kept.
        losses: the losses of the last phase, a list each.
        bits: the widths that most layers have, such as "w4a4".
    """

    sqnr: dict[str, float]
    own_sqnr: dict[str, float]
    channel_sqnr: dict[str, float]
    clipped: dict[str, float]
    dead: dict[str, int]
    steps: dict[str, float]
    step_history: dict[str, list[float]]
    agreement: float
    calibrated_agreement: float | None
    losses: dict[str, list[float]]
    bits: str

    def advice(self) -> list[str]:
        """What to try next, the most promising first."""
        found = []
        worst = min(self.own_sqnr, key=lambda name: self.own_sqnr[name])
        if self.own_sqnr[worst] < POOR_SQNR:
            found.append(
                f"{worst} has {self.own_sqnr[worst]:.1f} dB: give it more bits, "
                f'bits={{"default": "{self.bits}", "{worst}": 8}}, '
                'or all weights a step per channel, QuantSpec(granularity="channel")'
            )
        uneven = max(self.own_sqnr, key=lambda name: self.own_sqnr[name] - self.channel_sqnr[name])
        if self.channel_sqnr[uneven] < min(POOR_SQNR, self.own_sqnr[uneven] - DOMINATED):
            found.append(
                f"half of the channels of {uneven} have under {self.channel_sqnr[uneven]:.1f} dB where the layer has "
                f"{self.own_sqnr[uneven]:.1f}, so a few large ones set its range: weights a step per channel, "
                'QuantSpec(granularity="channel"), or recipe="equalize"'
            )
        most = max(self.clipped, key=lambda name: self.clipped[name], default=None)
        if most is not None and self.clipped[most] > MUCH_CLIPPED:
            found.append(
                f"{100 * self.clipped[most]:.0f} % of {most} lies beyond its range: "
                "calibrate with a lower_bound of 0.3, or with more images"
            )
        moved = {name: ratio for name, ratio in self.steps.items() if not 1 / 3 < ratio < 3}
        if moved:
            name = max(moved, key=lambda name: abs(torch.tensor(moved[name]).log().item()))
            found.append(f"the step of {name} changed {moved[name]:.2g}-fold while training: lower the rate of steps")
        for name, values in self.losses.items():
            if len(values) > 3 and values[-1] > 1.2 * min(values):
                found.append(f'the loss "{name}" ended at {values[-1]:.3g} after {min(values):.3g}: lower lr')
        if self.agreement < POOR_AGREEMENT:
            found.append(f"only {self.agreement:.0f} % agreement on the very images it was tuned on: more steps")
        if not found:
            found.append(
                "nothing stands out: if accuracy on real images is low, the synthetic images are too far from them"
            )
        return found

    def __str__(self) -> str:
        worst = sorted(self.own_sqnr, key=lambda name: self.own_sqnr[name])[:3]
        before = "" if self.calibrated_agreement is None else f" ({self.calibrated_agreement:.1f} % before fine-tuning)"
        lines = [
            f"agreement on the synthetic images: {self.agreement:.1f} %{before}",
            "weakest layers: " + ", ".join(f"{name} {self.own_sqnr[name]:.1f} dB" for name in worst),
            f"dead channels: {sum(self.dead.values())}",
            *(f"try: {line}" for line in self.advice()),
        ]
        return "\n".join(lines)

    def figure(self) -> Any:
        """Four panels: noise by layer, clipped share by tensor, change of steps, losses."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
        panels = [
            (self.own_sqnr, "SQNR (dB)", "Noise of each layer's own (dark: with what it inherits)"),
            ({name: 100 * share for name, share in self.clipped.items()}, "clipped (%)", "Values beyond their range"),
            ({} if self.step_history else self.steps, "step after / before", "Steps that moved"),
        ]
        for panel, (values, label, title) in zip(axes.flat, panels, strict=False):
            panel.plot(list(values.values()), range(len(values)), "o", color="#0065A8")
            if len(values) <= 24:
                panel.set_yticks(range(len(values)), list(values), fontsize=6)
            panel.set(xlabel=label, title=title)
            panel.invert_yaxis()
        axes[0, 0].plot(list(self.sqnr.values()), range(len(self.sqnr)), "^", color="#222222")
        axes[0, 0].axvline(POOR_SQNR, color="#D55E00", linestyle="--")
        for history in self.step_history.values():
            axes[1, 0].plot(history, color="#0065A8", alpha=0.4)
        if self.step_history:
            axes[1, 0].set(xlabel="look", ylabel="step / step at first", title="Steps while they are trained")
            axes[1, 0].set(yscale="log", ylim=None)
            axes[1, 0].invert_yaxis()
        for name, losses in self.losses.items():
            axes[1, 1].plot(losses, label=name)
        axes[1, 1].set(xlabel="look", ylabel="loss", title="Last phase")
        if self.losses:
            axes[1, 1].legend()
        return figure


@torch.no_grad()
def diagnose(report: Run, images: Tensor | Batches | None = None) -> Diagnosis:
    """Look into a quantized network: per-layer noise, ranges, dead channels, steps, agreement.

    The teacher is the network that was calibrated, without its quantizers (the model's own where that was not kept).

    Args:
        report: what ``dfqlib.quantize`` returned.
        images: (N, C, H, W), normalized, or a loader; None for the report's own synthetic ones.

    Raises:
        InputError: the report is not of a quantized network, or there are no images.

    Taught in notebook 11.
    """
    network, images = copy.deepcopy(report.model).cpu(), report.images if images is None else as_images(images)
    found = dict(quantizers(network))
    if not found or len(images) == 0:
        raise InputError(
            "report must be what dfqlib.quantize returned, with images; a distilled student has no quantizers"
        )
    calibrated = report.calibrated
    teacher = float_network(calibrated or network)
    images = images[:256].cpu()
    before = {} if calibrated is None else dict(quantizers(calibrated))
    own, by_channel = _own_sqnr(network, teacher, images)
    last = [row for row in report.history if row["phase"] == report.history[-1]["phase"]] if report.history else []
    names = [name for name in (last[-1] if last else {}) if name not in ("phase", "step", "seconds")]
    return Diagnosis(
        sqnr=sqnr(network, teacher, images),
        own_sqnr=own,
        channel_sqnr=by_channel,
        clipped=_clipped(network, images),
        dead=_dead(network),
        steps={
            name: float(quantizer.step.mean() / before[name].step.mean())  # type: ignore[operator]
            for name, quantizer in found.items()
            if isinstance(quantizer, StepQuantizer) and name in before
        },
        step_history=_step_history(report.steps, before),
        agreement=agreement(network, teacher, images),
        calibrated_agreement=None if calibrated is None else agreement(calibrated, teacher, images),
        losses={name: [float(row[name]) for row in last] for name in names},
        bits=_usual_widths(found),
    )


def _usual_widths(found: Mapping[str, Quantizer]) -> str:
    """The widths that most weights and most activations have."""
    widths: dict[bool, list[int]] = {True: [], False: []}
    for name, quantizer in found.items():
        widths[name.endswith("weight_quantizer")].append(quantizer.bits)
    weights, activations = (statistics.mode(widths[kind] or [8]) for kind in (True, False))
    return f"w{weights}a{activations}"


def _step_history(rows: list[dict[str, Any]], before: Mapping[str, Quantizer]) -> dict[str, list[float]]:
    """Each step at each look as a share of what calibration set."""
    history = {}
    for name, quantizer in before.items():
        values = [row[name] for row in rows if name in row]
        if values and isinstance(quantizer, StepQuantizer):
            first = float(quantizer.step.mean())
            history[name] = [1.0, *(value / first for value in values)]
    return history


def _own_sqnr(network: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Each quantized layer on the teacher's input of it, against the teacher's output: whole, and by median channel."""
    whole: dict[str, float] = {}
    by_channel: dict[str, float] = {}

    def look(name: str, x: Tensor, exact: Tensor) -> None:
        noise = network.get_submodule(name)(x) - exact
        rest = [axis for axis in range(exact.dim()) if axis != 1]
        signal, lost = exact.square().sum(rest), noise.square().sum(rest)
        whole[name] = float(10 * torch.log10(signal.sum() / lost.sum().clamp(min=1e-30)))
        alive = signal > 0  # a channel without signal has none to lose
        ratios = 10 * torch.log10(signal[alive] / lost[alive].clamp(min=1e-30))
        by_channel[name] = float(ratios.median()) if len(ratios) else whole[name]

    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: look(name, args[0], out))
        for name, module in teacher.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        predict(teacher, images)
    finally:
        for handle in handles:
            handle.remove()
    return whole, by_channel


def _clipped(network: nn.Module, images: Tensor) -> dict[str, float]:
    shares: dict[str, float] = {}

    def look(name: str, quantizer: StepQuantizer, x: Tensor) -> None:
        codes = x / quantizer.step
        beyond = (codes > quantizer.qmax + 0.5) | (codes < quantizer.qmin - 0.5)
        shares[name] = float(beyond.float().mean())

    handles = [
        quantizer.register_forward_pre_hook(lambda q, args, name=name: look(name, q, args[0]))
        for name, quantizer in quantizers(network)
        if isinstance(quantizer, StepQuantizer) and not name.endswith("weight_quantizer")
    ]
    try:
        predict(network, images)
    finally:
        for handle in handles:
            handle.remove()
    return shares


def _dead(network: nn.Module) -> dict[str, int]:
    """Channels whose BatchNorm gain is a thousandth of the layer's largest or less."""
    counts = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.running_var is not None:
            gain = module.weight.abs() / (module.running_var + module.eps).sqrt()
            counts[name] = int((gain <= 1e-3 * gain.max()).sum())
    return counts
