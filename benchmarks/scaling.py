"""How the cost grows: with images, with the batch, with the network, with threads.

    python benchmarks/scaling.py

Express optimizes all of its images in one batch, so their number is the batch of a synthesis step; fine-tuning costs
its number of steps times its batch, however many images the batches are drawn from. One step of each is timed while
one quantity changes, the sizes taking turns so that neighbours on the machine slow all of them alike, and a straight
line is fitted: its R² says how linear the growth is. Writes results/scaling.json and docs/scaling.png; needs no data
and no checkpoint, since time depends on neither.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, provenance, save, save_picture
from steps import CPU, SHAPE, Step, fine_tuning, synthesis_step, waiting

from dfqlib.models.complexity import complexity
from dfqlib.models.resnet import CifarResNet
from dfqlib.training.machine import processor

IMAGES = (64, 128, 256, 512)
BATCHES = (16, 32, 64, 128, 256)
DEPTHS = (20, 32, 44, 56)
Make = Callable[..., Step]


def seconds(steps: Mapping[float, Step], rounds: int, wait: Callable[[], None]) -> list[float]:
    """Median seconds of each step; they take turns."""
    for step in steps.values():
        step()
    found: dict[float, list[float]] = {size: [] for size in steps}
    for _ in range(rounds):
        for size, step in steps.items():
            wait()
            began = time.perf_counter()
            step()
            wait()
            found[size].append(time.perf_counter() - began)
    return [statistics.median(values) for values in found.values()]


def line(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """Slope and intercept of the straight line, and the share of the variance that it explains."""
    slope, intercept = statistics.linear_regression(sizes, values)
    left = sum((v - intercept - slope * s) ** 2 for s, v in zip(sizes, values, strict=True))
    mean = statistics.mean(values)
    return {"slope": slope, "intercept": intercept, "r2": 1 - left / sum((v - mean) ** 2 for v in values)}


def growth(steps: Mapping[float, Step], rounds: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Seconds by size, and the line through them."""
    sizes, values = list(steps), seconds(steps, rounds, wait)
    return {"sizes": sizes, "seconds": values, **line(sizes, values)}


def by_threads(step: Step, rounds: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Seconds on one thread, on two, on four, ... on all."""
    cores = os.cpu_count() or 1
    sizes = sorted({*(2**power for power in range(cores.bit_length())), cores})
    values = []
    for threads in sizes:
        torch.set_num_threads(threads)
        values += seconds({threads: step}, rounds, wait)
    torch.set_num_threads(1)
    return {"sizes": sizes, "seconds": values}


def measure(device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Quantity -> kind of step -> what it costs by size."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    wait = waiting(device)
    kinds: dict[str, Make] = {
        "synthesis": partial(synthesis_step, device=device, bf16=True),
        "fine-tuning": partial(fine_tuning, device=device, bf16=True),
    }
    images = {float(count): kinds["synthesis"](batch=count) for count in IMAGES}
    content: dict[str, dict[str, Any]] = {"images": {"synthesis": growth(images, rounds, wait)}}
    batches = {float(count): kinds["fine-tuning"](batch=count) for count in BATCHES}
    content["batch"] = {"fine-tuning": growth(batches, rounds, wait)}
    macs = {complexity(CifarResNet(depth), SHAPE)[1] / 1e6: depth for depth in DEPTHS}
    content["million multiply-adds of the network"] = {
        kind: growth({size: make(depth=depth) for size, depth in macs.items()}, rounds, wait)
        for kind, make in kinds.items()
    }
    if device == CPU:
        content["threads"] = {kind: by_threads(make(), 3 * rounds, wait) for kind, make in kinds.items()}
    return content


def draw(content: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel per quantity: points, and the line through them."""
    import matplotlib.pyplot as plt

    from dfqlib.lessons import plots

    plots.use_style()
    figure, axes = plt.subplots(1, len(content), figsize=(3.2 * len(content), 3.4), squeeze=False)
    styles = {"synthesis": 1, "fine-tuning": 2}
    for panel, (quantity, kinds) in zip(axes[0], content.items(), strict=True):
        for kind, found in kinds.items():
            index = styles[kind]
            style: dict[str, Any] = {"color": plots.PALETTE[index], "marker": plots.MARKERS[index]}
            sizes, values = found["sizes"], found["seconds"]
            panel.plot(sizes, values, linestyle="" if "r2" in found else ":", label=kind, **style)
            if "r2" in found:
                ends = (0.0, max(sizes))
                ordinates = [found["intercept"] + found["slope"] * x for x in ends]
                panel.plot(ends, ordinates, color=style["color"], linestyle=plots.LINES[index])
        fits = [found["r2"] for found in kinds.values() if "r2" in found]
        title = f"straight line: R² {min(fits):.3f}" if fits else "more threads"
        panel.set(xlabel=quantity, ylabel="seconds per step", ylim=(0, None), title=title)
        panel.legend()
        if quantity == "threads":
            panel.set_xticks(next(iter(kinds.values()))["sizes"])
    save_picture(path, plots.png(figure))


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--output", type=Path, default=ROOT, help="folder of results/ and docs/")
    args = parser.parse_args()
    cpu = f"CPU, 1 thread unless said, {processor()}"
    content = {
        "command": f"python benchmarks/scaling.py --rounds {args.rounds} --device {args.device}",
        "network": "CIFAR ResNets, 32x32, bfloat16; ResNet-20 and batches of 64 unless they are what changes",
        **provenance(cpu if args.device == CPU else torch.cuda.get_device_name(args.device)),
        "steps": measure(args.device, args.rounds),
    }
    for quantity, kinds in content["steps"].items():
        for kind, found in kinds.items():
            fit = f"R² {found['r2']:.4f}" if "r2" in found else ""
            print(f"{quantity:36s} {kind:12s} {[f'{value:.3f} s' for value in found['seconds']]} {fit}")
    save(args.output / "results" / "scaling.json", content)
    draw(content["steps"], args.output / "docs" / "scaling.png")


if __name__ == "__main__":
    main()
