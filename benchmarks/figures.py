"""Draw docs/*.png from the results files: accuracy against seconds, speed, scaling, and the picture of the README.

    python benchmarks/figures.py                  # all whose results and data are there
    python benchmarks/figures.py --only speed

The README's picture needs the CIFAR-10 checkpoint under ``--data``: its images are made on the spot.
"""

import argparse
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from cases import CASES, load, missing
from harness import DATA, ROOT, rows_of
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from speed import TABLES, against
from tables import by_threads, groups, summary

import dfqlib
from dfqlib.lessons import plots

NETWORK = "cifar10_resnet20"
OVERVIEW = {
    ("cifar10_w4a4", "quick", ""): "ResNet-20\nW4A4, quick",
    ("cifar10_w3a3", "published", ""): "ResNet-20\nW3A3, published",
    ("cifar10_w2a2", "quick", "images=1024,steps=6000"): "ResNet-20\nW2A2, 6,000 iterations",
    ("digits_w2a2", "quick", ""): "digits\nW2A2, quick",
}
"""(case, budget, variant) of ``express`` -> name of its bars."""
BARS = {"teacher_top1": "FP32", "calibrated_top1": "quantized, ranges only", "top1": "fine-tuned on its own images"}
ROWS_OF_IMAGES = 5


def accuracy(results: Path) -> Any:
    """How close to FP32 after how many seconds: a line per case, error bars of one standard deviation over seeds."""
    rows = rows_of(results / "accuracy_curve.json")
    points: dict[str, list[tuple[float, float, float]]] = {}
    for rows_of_point in groups(rows).values():
        found = summary(rows_of_point)
        point = (found["seconds"], found["difference"], found["difference_std"] or 0.0)
        points.setdefault(rows_of_point[0]["job"]["case"], []).append(point)
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.axhline(0, color=plots.PALETTE[0], linewidth=1)
    axes.annotate("FP32", (0, 0), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points")
    for index, (name, found_points) in enumerate(points.items()):
        case = CASES[name]
        seconds, differences, deviations = zip(*sorted(found_points), strict=True)
        label = f"W{case.bits}A{case.bits}, {case.protocol}"
        style: dict[str, Any] = {"color": plots.PALETTE[index], "marker": plots.MARKERS[index]}
        axes.errorbar(
            seconds, differences, deviations, label=label, capsize=3, linestyle=plots.LINES[index], **style
        )  # fmt: skip
        axes.set_title(f"{label}: {differences[-1]:+.1f} points from FP32 after {seconds[-1]:.0f} s", pad=10)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    seeds = len({row["job"]["seed"] for row in rows})
    axes.set(xlabel=f"seconds of a whole run (1 thread of {rows[0]['device']})")
    axes.set(ylabel=f"top-1 against FP32, points ({seeds} seeds)")
    axes.legend(loc="lower right")
    return figure


def speed(results: Path) -> Any:
    """Bars of the ratios, a panel per table, a color per number of threads."""
    measured = by_threads(rows_of(results / "speed.json"))
    figure, panels = plt.subplots(1, len(TABLES), figsize=(13, 3.6), width_ratios=[len(t) for t in TABLES.values()])
    for panel, (table, variants) in zip(panels, TABLES.items(), strict=True):
        base = next(iter(variants))
        series = {
            f"{threads} thread{'s' * (threads > 1)}": [against(tables[table], name, base) for name in variants]
            for threads, tables in measured.items()
        }
        names = [textwrap.fill(name, 15) for name in variants]
        tallest = max(max(ratios) for ratios in series.values())
        labels = {"ylabel": f"images/s against {base}", "title": table.capitalize()}
        plots.bars(panel, series, names, decimals=2, ylim=(0, 1.25 * tallest), **labels)
        panel.tick_params(axis="x", labelsize=7)
        if panel is not panels[0] and (legend := panel.get_legend()):
            legend.remove()
    return figure


def scaling(results: Path) -> Any:
    """A panel per quantity: points, the straight line through them, and how much of the variance it explains."""
    rows = rows_of(results / "scaling.json")
    quantities = list(dict.fromkeys(row["job"]["quantity"] for row in rows))
    figure, panels = plt.subplots(1, len(quantities), figsize=(3.2 * len(quantities), 3.4), squeeze=False)
    for panel, quantity in zip(panels[0], quantities, strict=True):
        fits = []
        for row in (row for row in rows if row["job"]["quantity"] == quantity):
            index = ("synthesis", "fine-tuning").index(row["job"]["kind"]) + 1
            style: dict[str, Any] = {"color": plots.PALETTE[index], "marker": plots.MARKERS[index]}
            fitted = quantity != "threads"
            line = "" if fitted else ":"
            panel.plot(row["sizes"], row["seconds"], linestyle=line, label=row["job"]["kind"], **style)
            if fitted:
                slope, intercept, r2 = straight_line(row["sizes"], row["seconds"])
                ends = (0.0, max(row["sizes"]))
                ordinates = [intercept + slope * x for x in ends]
                panel.plot(ends, ordinates, color=style["color"], linestyle=plots.LINES[index])
                fits.append(r2)
            else:
                panel.set_xticks(row["sizes"])
        title = f"straight line: R² {min(fits):.3f}" if fits else "more threads"
        panel.set(xlabel=quantity, ylabel="seconds per iteration", ylim=(0, None), title=title)
        panel.legend()
    return figure


def straight_line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept, and the share of the variance that the line explains (R²)."""
    slope, intercept = statistics.linear_regression(sizes, values)
    left = sum((value - intercept - slope * size) ** 2 for size, value in zip(sizes, values, strict=True))
    mean = statistics.mean(values)
    return slope, intercept, 1 - left / sum((value - mean) ** 2 for value in values)


def overview(results: Path, data: Path) -> Any:
    """Images that a network was made to draw, and what its low-bit versions reach."""
    teacher, _, shape = load(NETWORK, data)
    known = dfqlib.models.info(NETWORK)
    images = dfqlib.quantize(teacher, shape, steps=0, progress=False).images
    found = groups(rows_of(results / "accuracy_express.json"))
    summaries = [summary(found[name]) for name in OVERVIEW]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6))
    columns = len(known.classes)
    plots.image_grid(left, images[: ROWS_OF_IMAGES * columns], known.mean, known.std, columns)
    middles = [(shape[2] + 1) * (index + 0.5) for index in range(columns)]  # a line between two images
    left.set_axis_on()
    left.set_xticks(middles, known.classes, rotation=45, ha="right", fontsize=7)
    left.set_yticks([])
    left.grid(False)
    left.set_title("What a CIFAR-10 network remembers: images out of noise")
    series = {label: [each[key] for each in summaries] for key, label in BARS.items()}
    title = "Fine-tuning on them brings low-bit networks back"
    plots.bars(right, series, list(OVERVIEW.values()), ylim=(0, 125), ylabel="top-1 on test images, %", title=title)
    right.set_yticks(range(0, 101, 20))
    right.legend(loc="upper center", ncols=3, fontsize=8)
    return figure


FIGURES = {"accuracy": "accuracy_curve", "speed": "speed", "scaling": "scaling", "overview": "accuracy_express"}
"""Figure -> the results file that it shows."""


def main(words: list[str] | None = None) -> int:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args(words)
    plots.use_style()
    for name in args.only:
        lacking = "" if rows_of(args.results / f"{FIGURES[name]}.json") else f"no results/{FIGURES[name]}.json"
        if lacking := lacking or (missing(NETWORK, args.data) if name == "overview" else ""):
            print(f"{name}: left out, there is {lacking}", file=sys.stderr)
            continue
        drawn = overview(args.results, args.data) if name == "overview" else globals()[name](args.results)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{name}.png").write_bytes(plots.png(drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
