"""What a step costs: images per second and peak memory, each way of computing it beside the others.

    python benchmarks/speed.py                  # ResNet-20 at 32x32, batches of 64, one thread and two
    python benchmarks/speed.py --threads 1 --rounds 5

The ways of one table take turns, round after round, and a figure is the median of its rounds: neighbours on the
machine slow all of them alike, so ratios hold where times do not. Peak memory is measured apart, a process for each
way. Writes results/speed.json and docs/speed.png; needs no data and no checkpoint: time depends on neither.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accuracy import ROOT, peak_gb, processor
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import generators, losses, quantizer
from dfqlib.batchnorm import BatchNormProbe, freeze
from dfqlib.networks.resnet import CifarResNet
from dfqlib.recipes.base import descend
from dfqlib.training import channels_last, mixed_precision

BATCH = 64
SHAPE = (3, 32, 32)
CPU = torch.device("cpu")
Step = Callable[[], None]


def pictures(batch: int = BATCH) -> Tensor:
    """A batch of noise, laid out like the network's weights."""
    return torch.randn(batch, *SHAPE).contiguous(memory_format=torch.channels_last)


def network(depth: int = 20) -> nn.Module:
    """A ResNet with its BatchNorm statistics set by noise."""
    model = channels_last(CifarResNet(depth))
    model(pictures())
    return model


def float_training(*, bf16: bool = False) -> Step:
    """The ordinary step on labels: forward, backward, SGD, BatchNorm in training mode."""
    model, images, labels = network().train(), pictures(), torch.arange(BATCH) % 10
    sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        with mixed_precision(CPU, bf16):
            logits = model(images)
        descend(sgd, F.cross_entropy(logits.float(), labels))

    return step


def fine_tuning(
    *, bf16: bool = False, compiled: bool = False, naive: bool = False, teacher: bool = False,
    depth: int = 20, batch: int = BATCH,
) -> Step:  # fmt: skip
    """The W4A4 step of ``express``: distillation loss, Adam on weights and steps, BatchNorm frozen."""
    source, images = network(depth).eval(), pictures(batch)
    student = channels_last(quantizer.quantize_layers(source, quantizer.QuantSpec())).requires_grad_(True)
    quantizer.calibrate(student, images, "max")
    freeze(student)
    if compiled:
        quantizer.use_compiler(student)
    if naive:
        for _, each in quantizer.quantizers(student):
            each.forward = functools.partial(straight_through, each)  # type: ignore[method-assign]
    adam = torch.optim.Adam(quantizer.parameter_groups(student, 1e-5, 1e-6))
    with torch.no_grad():
        answers = source(images)

    def step() -> None:
        with mixed_precision(CPU, bf16):
            if teacher:
                with torch.no_grad():
                    target = source(images)
            else:
                target = answers
            logits = student(images)
        descend(adam, losses.distillation_loss(logits.float(), target.float(), 4.0))

    return step


def straight_through(each: Any, x: Tensor) -> Tensor:
    """A fake quantizer as it is usually written, every operation left to autograd."""
    scaled = torch.clamp(x / quantizer.functions.per_channel(each.step, x), each.qmin, each.qmax)
    return (scaled + (scaled.round() - scaled).detach()) * quantizer.functions.per_channel(each.step, x)


def synthesis_step(*, bf16: bool = False, contiguous: bool = False, depth: int = 20, batch: int = BATCH) -> Step:
    """The step of ``synthesis.from_noise`` under the BatchNorm loss."""
    teacher = network(depth).eval().requires_grad_(False)
    images = pictures(batch)
    if contiguous:
        teacher, images = teacher.to(memory_format=torch.contiguous_format), images.contiguous()  # type: ignore[call-overload]
    pixels = nn.Parameter(images)
    adam = torch.optim.Adam([pixels], 0.1)

    def step() -> None:
        with BatchNormProbe(teacher) as probe, mixed_precision(CPU, bf16):
            logits = teacher(pixels)
            loss = losses.bn_norm_loss(probe) + 0.2 * F.cross_entropy(logits, torch.arange(batch) % 10)
        descend(adam, loss)

    return step


def generator_step(*, bf16: bool = False) -> Step:
    """The generator's half of a GDFQ step: draw, look through the teacher, descend."""
    teacher = network().eval().requires_grad_(False)
    generator = channels_last(generators.ConditionalGenerator(SHAPE, 10)).train()
    adam = torch.optim.Adam(generator.parameters(), 1e-3)
    labels = torch.arange(BATCH) % 10

    def step() -> None:
        with BatchNormProbe(teacher) as probe, mixed_precision(CPU, bf16):
            logits = teacher(generator.sample(BATCH, labels))
            loss = F.cross_entropy(logits, labels) + 0.1 * losses.bn_l2_loss(probe)
        descend(adam, loss)

    return step


TABLES: dict[str, dict[str, Callable[[], Step]]] = {
    "fine-tuning": {
        "FP32 training": float_training,
        "FP32 training, bf16": functools.partial(float_training, bf16=True),
        "W4A4, naive straight-through": functools.partial(fine_tuning, naive=True),
        "W4A4": fine_tuning,
        "W4A4, compiled": functools.partial(fine_tuning, compiled=True),
        "W4A4, bf16": functools.partial(fine_tuning, bf16=True),
        "W4A4, bf16, compiled": functools.partial(fine_tuning, bf16=True, compiled=True),
        "W4A4, bf16, with the teacher's forward pass": functools.partial(fine_tuning, bf16=True, teacher=True),
    },
    "synthesis": {
        "contiguous": functools.partial(synthesis_step, contiguous=True),
        "channels last": synthesis_step,
        "channels last, bf16": functools.partial(synthesis_step, bf16=True),
    },
    "generator": {"FP32": generator_step, "bf16": functools.partial(generator_step, bf16=True)},
}
"""Table -> way -> what makes its step; the first way of a table is what the others are compared with."""


def rates(ways: dict[str, Callable[[], Step]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Images per second of each way in each round, after a warm-up."""
    torch.manual_seed(0)
    steps = {name: make() for name, make in ways.items()}
    for step in steps.values():
        step()
        step()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, step in steps.items():
            count, began = 0, time.perf_counter()
            while count < 2 or time.perf_counter() - began < seconds:
                step()
                count += 1
            found[name].append(BATCH * count / (time.perf_counter() - began))
    return found


@functools.cache
def peak_memory(table: str, way: str) -> float:
    """Gigabytes of a fresh process that does a few such steps on one thread."""
    command = [sys.executable, __file__, "--one", table, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def compare(threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Every table on so many threads."""
    torch.set_num_threads(threads)
    content: dict[str, Any] = {}
    for table, ways in TABLES.items():
        found = rates(ways, rounds, seconds)
        first = found[next(iter(ways))]
        content[table] = {}
        for name, values in found.items():
            ratios = [value / base for value, base in zip(values, first, strict=True)]
            content[table][name] = {
                "images_per_second": statistics.median(values),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "peak_gb": peak_memory(table, name),
            }
            row = content[table][name]
            print(
                f"{threads} thread(s) {table:12s} {name:46s} {row['images_per_second']:6.0f} img/s  "
                f"{row['ratio']:.2f}x  {row['peak_gb']:.2f} GB",
                flush=True,
            )
    return content


def draw(content: dict[str, Any], path: Path) -> None:
    """Bars of the ratios, a panel per table, a colour per thread count."""
    import matplotlib.pyplot as plt

    from dfqlib import plots

    plots.use_style()
    figure, axes = plt.subplots(1, len(TABLES), figsize=(13, 3.6), width_ratios=[len(t) for t in TABLES.values()])
    for panel, (table, ways) in zip(axes, TABLES.items(), strict=True):
        series = {
            f"{threads} thread{'s' * (threads != '1')}": [tables[table][name]["ratio"] for name in ways]
            for threads, tables in content["threads"].items()
        }
        names = [name.replace(", ", ",\n").replace(" the teacher's", "\nthe teacher's") for name in ways]
        plots.bars(panel, series, names, ylabel=f"images/s against {next(iter(ways))}", title=table.capitalize())
        panel.tick_params(axis="x", labelsize=7)
    path.write_bytes(plots.png(figure))


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, cores)}))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way in each round")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(1)
        step = TABLES[args.one[0]][args.one[1]]()
        for _ in range(4):
            step()
        print(peak_gb())
        return
    content = {
        "command": f"python benchmarks/speed.py --threads {' '.join(map(str, args.threads))} --rounds {args.rounds} "
        f"--seconds {args.seconds}",
        "network": f"ResNet-20, {SHAPE[1]}x{SHAPE[2]}, batches of {BATCH}",
        "device": f"CPU, {processor()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "threads": {str(threads): compare(threads, args.rounds, args.seconds) for threads in args.threads},
    }
    path = ROOT / "results" / "speed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    draw(content, ROOT / "docs" / "speed.png")


if __name__ == "__main__":
    main()
