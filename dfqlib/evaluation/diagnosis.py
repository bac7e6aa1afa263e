"""Diagnosis of a quantized network: the layers with the most quantization noise, and what to try next.

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
from dfqlib.evaluation.metrics import agreement, layers_of, recording, sqnr
from dfqlib.network.inference import Batches, as_images, predict
from dfqlib.quantizer import Quantizer, StepQuantizer, quantizers
from dfqlib.quantizer.plain import float_network

POOR_SQNR = 10.0
"""Decibels of a layer's output below which its noise is probably too large."""
MUCH_CLIPPED = 0.05
"""Share of clipped values above which the range is probably too small."""
DOMINATED = 10.0
"""Decibels between a layer and its median channel above which a few channels determine its range."""
POOR_AGREEMENT = 90.0
"""Percent of agreement on the synthetic images below which fine-tuning was too short."""


class Run(Protocol):
    """The part of a ``dfqlib.quantize`` report that ``diagnose`` reads."""

    model: nn.Module
    images: Tensor
    history: list[dict[str, Any]]
    calibrated: nn.Module | None
    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class Diagnosis:
    """Result of ``diagnose``.

    Attributes:
        sqnr: signal to quantization noise ratio of each layer's output in decibels, against the teacher.
        own_sqnr: the same when only that layer's weights are quantized and its input is the teacher's.
        channel_sqnr: median of that ratio over the layer's channels; far below ``own_sqnr`` where a few large channels
            determine the range.
        clipped: share of each activation beyond the range of its quantizer.
        dead: number of channels of each BatchNorm that are constant after it.
        steps: by quantizer, its step size after fine-tuning over that after calibration.
        step_history: the same ratio at each logged iteration, from 1 at the start.
        agreement: percent of the images on which model and teacher predict the same class.
        calibrated_agreement: the same before fine-tuning; None when that network was not kept.
        losses: the logged losses of the last phase, by name.
        bits: the most frequent bit widths, such as "w4a4".
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
        """Suggestions what to try next, the most promising first."""
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
                "calibrate with lower_bound=0.3, or on more images"
            )
        moved = {name: ratio for name, ratio in self.steps.items() if not 1 / 3 < ratio < 3}
        if moved:
            name = max(moved, key=lambda name: abs(torch.tensor(moved[name]).log().item()))
            found.append(f"the step size of {name} changed {moved[name]:.2g}-fold in training: lower step_lr")
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
        """Four panels: quantization noise by layer, clipped share by tensor, change of step sizes, losses."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
        panels = [
            (self.own_sqnr, "SQNR (dB)", "Each layer's own noise (dark: with that of its input)"),
            ({name: 100 * share for name, share in self.clipped.items()}, "clipped (%)", "Clipped values"),
        ]
        if not self.step_history:
            panels.append((self.steps, "step size after / before", "Change of step sizes"))
        for panel, (values, label, title) in zip(axes.flat, panels, strict=False):
            panel.plot(list(values.values()), range(len(values)), "o", color="#0065A8")
            if len(values) <= 24:
                panel.set_yticks(range(len(values)), list(values), fontsize=6)
            panel.set(xlabel=label, title=title)
            panel.invert_yaxis()
        axes[0, 0].plot(list(self.sqnr.values()), range(len(self.sqnr)), "^", color="#222222")
        axes[0, 0].axvline(POOR_SQNR, color="#D55E00", linestyle="--")
        if self.step_history:
            for history in self.step_history.values():
                axes[1, 0].plot(history, color="#0065A8", alpha=0.4)
            axes[1, 0].set(xlabel="logged iteration", ylabel="step size / first", title="Step sizes in training")
            axes[1, 0].set_yscale("log")
        for name, losses in self.losses.items():
            axes[1, 1].plot(losses, label=name)
        axes[1, 1].set(xlabel="logged iteration", ylabel="loss", title="Last phase")
        if self.losses:
            axes[1, 1].legend()
        return figure


@torch.no_grad()
def diagnose(report: Run, images: Tensor | Batches | None = None) -> Diagnosis:
    """Measure noise, clipping, dead channels, step sizes and agreement of a quantized network.

    The teacher is the calibrated network without its quantizers (or the model itself where that was not kept).

    Args:
        report: what ``dfqlib.quantize`` returned.
        images: (N, C, H, W), normalized, or a loader, of which the first 256 are used; None for the report's own.

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
    before = {
        name: quantizer
        for name, quantizer in ([] if calibrated is None else quantizers(calibrated))
        if isinstance(quantizer, StepQuantizer)
    }
    own, by_channel = _own_sqnr(network, teacher, images)
    last = [row for row in report.history if row["phase"] == report.history[-1]["phase"]]
    names = [name for name in (last[-1] if last else {}) if name not in ("phase", "step", "seconds")]
    return Diagnosis(
        sqnr=sqnr(network, teacher, images),
        own_sqnr=own,
        channel_sqnr=by_channel,
        clipped=_clipped(network, images),
        dead=_dead(network),
        steps={
            name: float(quantizer.step.mean() / before[name].step.mean())
            for name, quantizer in found.items()
            if isinstance(quantizer, StepQuantizer) and name in before
        },
        step_history=_step_history(report.steps, before),
        agreement=agreement(network, teacher, images),
        calibrated_agreement=None if calibrated is None else agreement(calibrated, teacher, images),
        losses={name: [float(row[name]) for row in last] for name in names},
        bits=_usual_bits(found),
    )


def _usual_bits(found: Mapping[str, Quantizer]) -> str:
    """The most frequent bit width of weights and of activations."""
    widths = (
        statistics.mode([q.bits for name, q in found.items() if name.endswith("weight_quantizer") == weights] or [8])
        for weights in (True, False)
    )
    return "w{}a{}".format(*widths)


def _step_history(rows: list[dict[str, Any]], before: Mapping[str, StepQuantizer]) -> dict[str, list[float]]:
    """Each step size at each logged iteration, over its calibrated value."""
    history = {}
    for name, quantizer in before.items():
        values = [row[name] for row in rows if name in row]
        if values:
            first = float(quantizer.step.mean())
            history[name] = [1.0, *(value / first for value in values)]
    return history


def _own_sqnr(network: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """SQNR of each layer of ``network`` on the teacher's input of it: of the whole layer, and of its median channel."""
    whole: dict[str, float] = {}
    by_channel: dict[str, float] = {}

    def record(name: str, x: Tensor, exact: Tensor) -> None:
        noise = network.get_submodule(name)(x) - exact
        rest = [axis for axis in range(exact.dim()) if axis != 1]
        signal, lost = exact.square().sum(rest), noise.square().sum(rest)
        whole[name] = float(10 * torch.log10(signal.sum() / lost.sum().clamp(min=1e-30)))
        alive = signal > 0
        ratios = 10 * torch.log10(signal[alive] / lost[alive].clamp(min=1e-30))
        by_channel[name] = float(ratios.median()) if len(ratios) else whole[name]

    with recording(layers_of(teacher), record):
        predict(teacher, images)
    return whole, by_channel


def _clipped(network: nn.Module, images: Tensor) -> dict[str, float]:
    shares: dict[str, float] = {}
    activations = {
        name: quantizer
        for name, quantizer in quantizers(network)
        if isinstance(quantizer, StepQuantizer) and not name.endswith("weight_quantizer")
    }

    def record(name: str, x: Tensor, _: Tensor) -> None:
        quantizer = activations[name]
        scaled = x / quantizer.step
        beyond = (scaled > quantizer.qmax + 0.5) | (scaled < quantizer.qmin - 0.5)
        shares[name] = float(beyond.float().mean())

    with recording(activations, record):
        predict(network, images)
    return shares


def _dead(network: nn.Module) -> dict[str, int]:
    """Number of channels whose BatchNorm gain is a thousandth of the layer's largest or less."""
    counts = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.running_var is not None:
            gain = module.weight.abs() / (module.running_var + module.eps).sqrt()
            counts[name] = int((gain <= 1e-3 * gain.max()).sum())
    return counts
