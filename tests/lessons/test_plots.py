"""Figures: distinguishable in greyscale, labelled, small."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from dfqlib.lessons import plots

mpl = pytest.importorskip("matplotlib", reason="figures need matplotlib")
mpl.use("agg")


@pytest.fixture
def axes():
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        plots.use_style()
        figure, axes = plt.subplots()
        yield axes
        plt.close(figure)


def lightness(colour: str) -> float:
    """CIE L* of a hexadecimal sRGB colour."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16


def test_the_palette_survives_greyscale():
    assert all(after - before > 10 for before, after in pairwise(map(lightness, plots.PALETTE)))
    assert len(plots.PALETTE) == len(plots.LINES) == len(plots.HATCHES)


def test_a_png_is_small_and_closes_its_figure(axes):
    import matplotlib.pyplot as plt

    plots.scatter(axes, torch.randn(1000, 2), torch.arange(1000) % 2, 4.0)
    data = plots.png(axes.figure)
    assert data.startswith(b"\x89PNG")
    assert len(data) < 60_000
    assert axes.figure.number not in plt.get_fignums()


def test_scatter_counts_what_lies_outside(axes):
    plots.scatter(axes, torch.tensor([[0.0, 0.0], [9.0, 0.0]]), None, 4.0)
    assert axes.texts[0].get_text() == "1 of 2 outside"
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_the_decision_map_is_not_transposed(axes):
    network = torch.nn.Linear(2, 2)
    with torch.no_grad():  # class 1 where x1 > 1, so the boundary is the vertical line there
        network.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        network.bias.copy_(torch.tensor([1.0, 0.0]))
    plots.decision_map(axes, network, 4.0)
    boundary = torch.tensor(axes.collections[-1].get_paths()[0].vertices)
    assert torch.allclose(boundary[:, 0], torch.ones(len(boundary), dtype=boundary.dtype), atol=1e-3)


def test_bars_carry_their_values_and_lines_their_names(axes):
    plots.bars(axes, {"one": [1.0, 2.0], "two": [3.0, 4.0]}, ["a", "b"], errors={"one": [0, 0], "two": [0, 0]})
    assert {text.get_text() for text in axes.texts} >= {"1.0", "2.0", "3.0", "4.0"}
    axes.clear()
    plots.lines(axes, {"one": [1.0, 2.0], "two": [2.0, 1.0]}, title="t")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()


def test_an_image_grid_shows_the_original_colours(axes):
    images = (torch.full((3, 1, 4, 4), 0.25) - 0.5) / 0.5
    plots.image_grid(axes, images, (0.5,), (0.5,), columns=2)
    canvas = axes.images[0].get_array()
    assert canvas.shape == (9, 9, 3)
    assert canvas[0, 0, 0] == pytest.approx(0.25)
    assert canvas[8, 8, 0] == 1  # the empty place


WITHOUT_MATPLOTLIB = """
import sys


class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(f"{name} was imported")


sys.meta_path.insert(0, Refuse())
import dfqlib.lessons.plots
"""


def test_importing_needs_no_matplotlib():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MATPLOTLIB], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
