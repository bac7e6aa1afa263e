"""Draw docs/accuracy.png from results/accuracy_curve.json: how close to FP32 after how many seconds.

python benchmarks/curve.py        # ``python benchmarks/accuracy.py --curve`` measures, and draws it, too
"""

import json
from pathlib import Path
from typing import Any

from harness import ROOT, save_picture

Point = tuple[float, float, float]
"""Seconds, difference from FP32 in points, its standard deviation over the seeds."""


def lines(cases: dict[str, Any]) -> dict[str, list[Point]]:
    """Widths and protocol -> points, the quickest first."""
    found: dict[str, list[Point]] = {}
    several = len({entry["case"]["network"] for entry in cases.values()}) > 1
    for entry in cases.values():
        case, summary = entry["case"], entry["summary"]
        name = f"{case['bits'].upper()}, {case['protocol']}" + f", {case['network']}" * several
        point = (summary["seconds"], summary["difference"], summary["difference_std"] or 0.0)
        found.setdefault(name, []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def title(found: dict[str, list[Point]]) -> str:
    """What the longest run of the first line reached."""
    name, points = next(iter(found.items()))
    seconds, difference, _ = points[-1]
    return f"{name}: {difference:+.1f} points from FP32 after {seconds:.0f} s"


def draw(cases: dict[str, Any]) -> bytes:
    """The figure's bytes: one line per widths and protocol, error bars of one standard deviation over the seeds."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from dfqlib.lessons import plots

    plots.use_style()
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.axhline(0, color=plots.PALETTE[0], linewidth=1)
    axes.annotate("FP32", (0, 0), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points")
    found = lines(cases)
    for index, (name, points) in enumerate(found.items()):
        seconds, differences, deviations = zip(*points, strict=True)
        axes.errorbar(
            seconds, differences, deviations, label=name, capsize=3, linewidth=1.5,
            color=plots.PALETTE[index % len(plots.PALETTE)], marker=plots.MARKERS[index % len(plots.MARKERS)],
            linestyle=plots.LINES[index % len(plots.LINES)],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    devices = " or ".join(dict.fromkeys(entry["device"] for entry in cases.values()))
    seeds = sorted({len(entry["summary"]["seeds"]) for entry in cases.values()})
    several = f"{' or '.join(map(str, seeds))} seed{'s' * (seeds[-1] > 1)}"
    axes.set(xlabel=f"seconds of a whole run ({devices})", ylabel=f"top-1 against FP32, points ({several})")
    axes.set_title(title(found), pad=10)
    axes.legend(loc="lower right")
    return plots.png(figure)


def redraw(output: Path = ROOT) -> None:
    """The figure of what the results file holds, if it holds something."""
    path = output / "results" / "accuracy_curve.json"
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    if cases:
        save_picture(output / "docs" / "accuracy.png", draw(cases))


if __name__ == "__main__":
    redraw()
