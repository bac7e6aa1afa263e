"""Figures in one style: labeled, small, readable in grayscale and with color-vision deficiency.

Matplotlib is imported inside the functions; ``axes`` are its axes. Taught in notebook 01.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PALETTE = ("#222222", "#0065A8", "#D55E00", "#E8A400", "#A5D4F2")
"""Dark to light, at least 12 units of CIE lightness apart, so that the order survives grayscale."""
MARKERS = ("o", "^", "s", "D", "v")
LINES = ("-", "--", "-.", ":", (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\")
MAX_SCATTER = 700
"""Largest number of points drawn in a panel."""


def use_style() -> None:
    """Set matplotlib's defaults for a lesson."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "axes.prop_cycle": cycler(color=PALETTE),
        }
    )


def png(figure: Any) -> bytes:
    """The bytes of a PNG file with at most 64 colors; closes the figure."""
    import matplotlib.pyplot as plt
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png")
    plt.close(figure)
    image = Image.open(full).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def show(figure: Any) -> Any:
    """The figure as a small PNG, for the last expression of a cell."""
    from IPython.display import Image

    return Image(png(figure), format="png")


def decision_map(axes: Any, network: nn.Module, extent: float) -> None:
    """Shade the classes of a classifier of points in the plane, and draw the boundary.

    Args:
        network: from points of shape (n, 2) to two logits.
        extent: the map covers [-extent, extent] in both directions.
    """
    side = torch.linspace(-extent, extent, 120)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        share = network(grid).softmax(1)[:, 1].reshape(len(side), len(side)).T
    axes.contourf(side, side, share, levels=[0, 0.5, 1], colors=["#E3EDF5", "#FDF4DC"])
    axes.contour(side, side, share, levels=[0.5], colors="#222222", linewidths=1.4)


def scatter(axes: Any, points: Tensor, labels: Tensor | None, extent: float) -> None:
    """Scatter plot of two classes (dark circles, light triangles) or of points without labels (gray crosses).

    Args:
        axes: get equal scales and the range [-extent, extent].
        points: shape (n, 2); the first ``MAX_SCATTER`` are drawn.
        labels: shape (n,), or None.
        extent: half the side of the drawn square; the corner shows the number of points outside.
    """
    points = points.detach()
    outside = int((points.abs() > extent).any(1).sum())
    shown = points[:MAX_SCATTER]
    if labels is None:
        axes.scatter(*shown.T, s=11, marker="x", linewidths=0.7, color="#666666", label="no label")
    else:
        for value, color, marker in ((0, PALETTE[1], "o"), (1, PALETTE[3], "^")):
            mine = shown[labels[:MAX_SCATTER] == value]
            style = {"s": 11, "linewidths": 0.3, "edgecolors": "#222222"}
            axes.scatter(*mine.T, marker=marker, color=color, label=f"class {value}", **style)
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    axes.grid(False)
    if outside:
        style = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        note = f"{outside} of {len(points)} outside"
        axes.text(0.98, 0.02, note, transform=axes.transAxes, ha="right", fontsize=8, bbox=style)


def lines(axes: Any, series: Mapping[str, Sequence[float]], x: Sequence[float] | None = None, **labels: str) -> None:
    """One line per series, told apart by lightness and dash pattern.

    Args:
        series: name → values.
        x: shared positions; None for 0, 1, 2, …
        **labels: ``title``, ``xlabel``, ``ylabel``, ``yscale`` of the axes.
    """
    for (name, values), color, dashes in zip(series.items(), PALETTE, LINES, strict=False):
        positions = range(len(values)) if x is None else x
        axes.plot(positions, values, color=color, linestyle=dashes, linewidth=1.5, label=name)
    axes.set(**labels)
    if len(series) > 1:
        axes.legend()


def bars(
    axes: Any,
    series: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    *,
    errors: Mapping[str, Sequence[float]] | None = None,
    decimals: int = 1,
    **labels: Any,
) -> None:
    """Grouped bars with their values written on them, told apart by lightness and hatching.

    Args:
        series: name → one value per group.
        groups: names under the groups.
        errors: name → half the length of the error bars, in the unit of the values.
        decimals: decimals of the written values.
        **labels: ``title``, ``xlabel``, ``ylabel``, ``yscale``, ``ylim`` of the axes.
    """
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        color, hatch = PALETTE[(index + 1) % len(PALETTE)], HATCHES[index % len(HATCHES)]
        style = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        error = errors[name] if errors else None
        drawn = axes.bar(places, values, width * 0.92, yerr=error, capsize=3, label=name, **style)
        axes.bar_label(drawn, fmt=f"%.{decimals}f", fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="x", visible=False)
    axes.set(**labels)
    if len(series) > 1:
        axes.legend()


def image_grid(axes: Any, images: Tensor, mean: Sequence[float], std: Sequence[float], columns: int = 8) -> None:
    """Draw normalized images side by side in their original colors.

    Args:
        images: shape (n, channels, height, width), 1 or 3 channels, normalized with ``mean`` and ``std``.
        mean: per channel.
        std: per channel.
        columns: images per row.
    """
    shape = (1, -1, 1, 1)
    colors = images.detach().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    count, channels, height, width = colors.shape
    rows = -(-count // columns)
    canvas = torch.ones(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for index, image in enumerate(colors.clamp(0, 1)):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        canvas[:, top : top + height, left : left + width] = image
    axes.imshow(canvas.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
    axes.set_axis_off()


def layer_dots(axes: Any, series: Mapping[str, Mapping[str, float]], **labels: Any) -> None:
    """One row per layer, with a marker per series and a line from the first series to the last.

    Args:
        series: name → layer → value, the same layers in each.
        **labels: ``title``, ``xlabel``, … of the axes.
    """
    layers = list(next(iter(series.values())))
    rows = range(len(layers))
    ends = [list(values.values()) for values in series.values()]
    axes.hlines(rows, ends[0], ends[-1], color="#BBBBBB", linewidth=1.5)
    for (name, values), color, marker in zip(series.items(), PALETTE[1:], MARKERS, strict=False):
        axes.plot([values[layer] for layer in layers], rows, marker, color=color, markersize=6, label=name)
    axes.set_yticks(rows, layers)
    axes.invert_yaxis()
    axes.set(**labels)
    if len(series) > 1:
        axes.legend()


def dataflow(axes: Any, edges: Sequence[tuple[str, str]], labels: Mapping[str, str], marked: set[str]) -> None:
    """Draw operations as boxes in a row, joined to their consumers by arrows (neighbors) and arcs (skips).

    Args:
        edges: (operation, consumer), by key.
        labels: key → text of the box, in order of execution.
        marked: keys of the boxes to emphasize.
    """
    from matplotlib.patches import Rectangle

    place = {key: index for index, key in enumerate(labels)}
    for key, text in labels.items():
        fill, ink = (PALETTE[2], "white") if key in marked else ("#EDEDED", "#222222")
        axes.add_patch(
            Rectangle((place[key] - 0.26, -0.5), 0.52, 1, facecolor=fill, edgecolor="#555555", linewidth=0.7)
        )
        axes.text(place[key], 0, text, rotation=90, ha="center", va="center", fontsize=8.5, color=ink)
    for start, end in edges:
        distance = place[end] - place[start]
        style = {"arrowstyle": "-|>", "color": "#222222", "shrinkA": 0, "shrinkB": 0}
        edge, height = (0.26, 0.0) if distance == 1 else (0.0, 0.5)
        if distance > 1:
            style["connectionstyle"] = f"bar,fraction={-0.12 / distance**0.5:.3f}"
        axes.annotate("", (place[end] - edge, height), (place[start] + edge, height), arrowprops=style)
    axes.set(xlim=(-0.5, len(labels) - 0.5), ylim=(-0.6, 1.0))
    axes.set_axis_off()
