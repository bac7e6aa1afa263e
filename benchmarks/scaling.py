"""How the cost grows: with images, with the batch, with the network, with threads.

    python benchmarks/scaling.py

Times one step of synthesis and one of fine-tuning while one quantity changes, the sizes taking turns so that neighbours
on the machine slow all of them alike, and fits a straight line: its R² says how linear the growth is. Writes
results/scaling.json and docs/scaling.png; needs no data and no checkpoint, since time depends on neither.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accuracy import ROOT, processor
from speed import SHAPE, fine_tuning, synthesis_step

from dfqlib.networks.complexity import complexity
from dfqlib.networks.resnet import CifarResNet

BATCHES = (16, 32, 64, 128, 256)
DEPTHS = (20, 32, 44, 56)
KINDS: dict[str, Callable[..., Callable[[], None]]] = {"synthesis": synthesis_step, "fine-tuning": fine_tuning}


def seconds(steps: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, float]:
    """Median seconds of each step; they take turns."""
    for step in steps.values():
        step()
    found: dict[Any, list[float]] = {size: [] for size in steps}
    for _ in range(rounds):
        for size, step in steps.items():
            began = time.perf_counter()
            step()
            found[size].append(time.perf_counter() - began)
    return {size: statistics.median(values) for size, values in found.items()}


def line(sizes: list[float], values: list[float]) -> dict[str, float]:
    """Slope and intercept of the straight line, and the share of the variance that it explains."""
    slope, intercept = statistics.linear_regression(sizes, values)
    left = sum((v - intercept - slope * s) ** 2 for s, v in zip(sizes, values, strict=True))
    mean = statistics.mean(values)
    return {"slope": slope, "intercept": intercept, "r2": 1 - left / sum((v - mean) ** 2 for v in values)}


def growth(steps: dict[Any, Callable[[], None]], sizes: list[float], rounds: int) -> dict[str, Any]:
    """Seconds by size, and the line through them."""
    values = list(seconds(steps, rounds).values())
    return {"sizes": sizes, "seconds": values, **line(sizes, values)}


def measure(rounds: int) -> dict[str, Any]:
    """Every kind of step against images per step, the network's MACs and threads."""
    torch.manual_seed(0)
    content: dict[str, Any] = {}
    macs = [complexity(CifarResNet(depth), SHAPE)[1] / 1e6 for depth in DEPTHS]
    for kind, make in KINDS.items():
        torch.set_num_threads(1)
        by_batch = {batch: make(bf16=True, batch=batch) for batch in BATCHES}
        by_depth = {depth: make(bf16=True, depth=depth) for depth in DEPTHS}
        content[kind] = {
            "images per step": growth(by_batch, [float(batch) for batch in BATCHES], rounds),
            "MMACs of the network": growth(by_depth, macs, rounds),
        }
        step, by_threads = make(bf16=True), {}
        for threads in range(1, (os.cpu_count() or 1) + 1):
            torch.set_num_threads(threads)
            by_threads[threads] = seconds({threads: step}, 3 * rounds)[threads]
        content[kind]["threads"] = {"sizes": list(by_threads), "seconds": list(by_threads.values())}
        for name, found in content[kind].items():
            fit = f"R² {found['r2']:.4f}" if "r2" in found else ""
            print(f"{kind:12s} {name:22s} {[f'{value:.3f} s' for value in found['seconds']]} {fit}", flush=True)
    return content


def draw(content: dict[str, Any], path: Path) -> None:
    """A panel per quantity: points, and the line through them."""
    import matplotlib.pyplot as plt

    from dfqlib import plots

    plots.use_style()
    names = list(next(iter(content.values())))
    figure, axes = plt.subplots(1, len(names), figsize=(12, 3.4))
    for panel, name in zip(axes, names, strict=True):
        for index, (kind, found) in enumerate((kind, tables[name]) for kind, tables in content.items()):
            style: dict[str, Any] = {"color": plots.PALETTE[index + 1], "marker": plots.MARKERS[index]}
            sizes, values = found["sizes"], found["seconds"]
            panel.plot(sizes, values, linestyle="" if "r2" in found else ":", label=kind, **style)
            if "r2" in found:
                ends = (0.0, max(sizes))
                panel.plot(ends, [found["intercept"] + found["slope"] * x for x in ends], color=style["color"])
        panel.set(xlabel=name, ylabel="seconds per step", ylim=(0, None))
    axes[0].set_title("Cost is linear in images ...")
    axes[1].set_title("... and in multiply-adds")
    axes[2].set_title("Threads")
    axes[2].set_xticks(next(iter(content.values()))["threads"]["sizes"])
    axes[0].legend(frameon=False)
    path.write_bytes(plots.png(figure))


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    content = {
        "command": f"python benchmarks/scaling.py --rounds {args.rounds}",
        "network": "CIFAR ResNets, 32x32, bfloat16; ResNet-20 and batches of 64 unless they are what changes",
        "device": f"CPU, 1 thread unless said, {processor()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "steps": measure(args.rounds),
    }
    path = ROOT / "results" / "scaling.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    draw(content["steps"], ROOT / "docs" / "scaling.png")


if __name__ == "__main__":
    main()
