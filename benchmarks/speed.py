"""What a step costs: images per second and peak memory, each way of computing it beside the others.

    python benchmarks/speed.py                  # ResNet-20 at 32x32, batches of 64, one thread and two
    python benchmarks/speed.py --threads 1 --rounds 5
    python benchmarks/speed.py --device cuda

The ways of one table take turns, round after round, and a figure is the median of its rounds: neighbours on the
machine slow all of them alike, so ratios hold where times do not. Peak memory is measured apart, a process for each
way. Writes results/speed.json, with the ratios that were asked for and what they are, and docs/speed.png; needs no data
and no checkpoint: time depends on neither.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, against, peak_gb, provenance, save, save_picture
from steps import BATCH, CPU, SHAPE, Step, fine_tuning, float_training, generator_step, synthesis_step, waiting

from dfqlib.training.machine import processor

FLOAT, NAIVE, OURS, FAST = "FP32 training", "W4A4, naive straight-through", "W4A4", "W4A4, bf16, compiled"
TABLES: dict[str, dict[str, Callable[..., Step]]] = {
    "fine-tuning": {
        FLOAT: float_training,
        "FP32 training, bf16": functools.partial(float_training, bf16=True),
        "FP32 training, bf16, compiled": functools.partial(float_training, bf16=True, compiled=True),
        NAIVE: functools.partial(fine_tuning, naive=True),
        OURS: fine_tuning,
        "W4A4, compiled": functools.partial(fine_tuning, compiled=True),
        "W4A4, bf16": functools.partial(fine_tuning, bf16=True),
        FAST: functools.partial(fine_tuning, bf16=True, compiled=True),
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

ASKED = ((OURS, FLOAT, 0.85), (FAST, FLOAT, 1.4), (OURS, NAIVE, 1.15), (FAST, NAIVE, 1.9))
"""(way of fine-tuning, what it is compared with, how many times as fast it has to be); all in channels last."""


def rates(ways: dict[str, Callable[..., Step]], device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """Images per second of each way in each round, after a warm-up."""
    torch.manual_seed(0)
    wait = waiting(device)
    steps = {name: make(device=device) for name, make in ways.items()}
    for step in steps.values():
        step()
        step()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, step in steps.items():
            wait()
            count, began = 0, time.perf_counter()
            while count < 2 or time.perf_counter() - began < seconds:
                step()
                count += 1
            wait()
            found[name].append(BATCH * count / (time.perf_counter() - began))
    return found


@functools.cache
def peak_memory(table: str, way: str, device: str) -> float:
    """Gigabytes of a fresh process that does a few such steps on one thread; with CUDA, of the device."""
    command = [sys.executable, __file__, "--device", device, "--one", table, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def a_few_steps(table: str, way: str, device: torch.device) -> float:
    """The peak memory of this process, or of the device, after a few steps."""
    torch.set_num_threads(1)
    step = TABLES[table][way](device=device)
    for _ in range(4):
        step()
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else peak_gb()


def compare(threads: int, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """Every table on so many threads."""
    torch.set_num_threads(threads)
    content: dict[str, Any] = {}
    for table, ways in TABLES.items():
        found = rates(ways, device, rounds, seconds)
        first = found[next(iter(ways))]
        content[table] = {}
        for name, values in found.items():
            ratios = [value / base for value, base in zip(values, first, strict=True)]
            content[table][name] = {
                "images_per_second": statistics.median(values),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "peak_gb": peak_memory(table, name, str(device)),
            }
            row = content[table][name]
            print(
                f"{threads} thread(s) {table:12s} {name:46s} {row['images_per_second']:6.0f} img/s  "
                f"{row['ratio']:.2f}x  {row['peak_gb']:.2f} GB",
                flush=True,
            )
    return content


def reached(by_threads: dict[str, Any]) -> list[dict[str, Any]]:
    """Each ratio that was asked for, and what it is on so many threads."""
    return [
        {
            "way": way,
            "against": base,
            "asked": asked,
            "measured": {name: against(tables["fine-tuning"], way, base) for name, tables in by_threads.items()},
        }
        for way, base, asked in ASKED
    ]


def draw(content: dict[str, Any], path: Path) -> None:
    """Bars of the ratios, a panel per table, a colour per thread count."""
    import matplotlib.pyplot as plt

    from dfqlib.lessons import plots

    plots.use_style()
    figure, axes = plt.subplots(1, len(TABLES), figsize=(13, 3.6), width_ratios=[len(t) for t in TABLES.values()])
    for panel, (table, ways) in zip(axes, TABLES.items(), strict=True):
        series = {
            f"{threads} thread{'s' * (threads != '1')}": [tables[table][name]["ratio"] for name in ways]
            for threads, tables in content["threads"].items()
        }
        names = [textwrap.fill(name, 15) for name in ways]
        tallest = max(max(ratios) for ratios in series.values())
        labels: dict[str, Any] = {"ylabel": f"images/s against {next(iter(ways))}", "title": table.capitalize()}
        plots.bars(panel, series, names, decimals=2, ylim=(0, 1.25 * tallest), **labels)
        panel.tick_params(axis="x", labelsize=7)
        if panel is not axes[0] and (legend := panel.get_legend()):
            legend.remove()
    save_picture(path, plots.png(figure))


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, cores)}))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way in each round")
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--output", type=Path, default=ROOT, help="folder of results/ and docs/")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch finds no CUDA device here")
    if args.one:
        table, way = args.one
        print(a_few_steps(table, way, args.device))
        return
    by_threads = {str(n): compare(n, args.device, args.rounds, args.seconds) for n in args.threads}
    device = f"CPU, {processor()}" if args.device == CPU else torch.cuda.get_device_name(args.device)
    content = {
        "command": f"python benchmarks/speed.py --threads {' '.join(map(str, args.threads))} --rounds {args.rounds} "
        f"--seconds {args.seconds} --device {args.device}",
        "network": f"ResNet-20, {SHAPE[1]}x{SHAPE[2]}, batches of {BATCH}",
        **provenance(device),
        "targets": reached(by_threads),
        "threads": by_threads,
    }
    for target in content["targets"]:
        ratios = ", ".join(f"{ratio:.2f} on {n} thread(s)" for n, ratio in target["measured"].items())
        print(f"{target['way']} against {target['against']}: {ratios}; asked {target['asked']}")
    save(args.output / "results" / "speed.json", content)
    draw(content, args.output / "docs" / "speed.png")


if __name__ == "__main__":
    main()
