"""Panels that explain themselves, parameters that are checked, verdicts on exercises."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dfqlib.errors import InputError
from dfqlib.lessons import widgets

pytest.importorskip("ipywidgets", reason="panels need the notebooks extra")


def draw(value):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, value])
    return figure


def compute(height):
    if height == 0:
        raise InputError("height=0 must be above 0 & finite")
    if height == 3:
        raise ZeroDivisionError
    return height


@pytest.fixture
def panel():
    return widgets.panel(compute, draw, {"height": widgets.slider(1, 0, 3, 1, "height")})


def test_a_moved_slider_redraws(panel):
    before = panel.image.value
    panel.controls["height"].value = 2
    assert panel.result == 2
    assert panel.image.value != before


def test_input_that_cannot_be_used_is_explained_and_forgotten(panel):
    before = panel.image.value
    panel.controls["height"].value = 0
    assert "height=0 must be above 0 &amp; finite" in panel.message.value
    assert panel.image.value == before
    panel.controls["height"].value = 1
    assert panel.message.value == ""


def test_a_bug_is_not_explained_away(panel):
    with pytest.raises(ZeroDivisionError):
        panel.controls["height"].value = 3


def test_sliders_are_whole_real_or_logarithmic():
    kinds = [
        type(widgets.slider(*numbers, "x", log=log)).__name__
        for numbers, log in (((1, 0, 3, 1), False), ((1.0, 0, 3, 1), False), ((1.0, -2, 2, 1), True))
    ]
    assert kinds == ["IntSlider", "FloatSlider", "FloatLogSlider"]


def test_parameters_of_the_wrong_type_or_size_are_named():
    allowed = {"bits": (int, 2, 8), "beta": (float, 0, 10)}
    widgets.check_parameters({"bits": 2, "beta": 1}, allowed)
    with pytest.raises(InputError, match=r"bits='4' must be a whole number from 2 to 8; beta=-1 must be a number"):
        widgets.check_parameters({"bits": "4", "beta": -1}, allowed)
    for bits in (True, 2.0, 9, float("nan"), None):
        with pytest.raises(InputError, match="bits="):
            widgets.check_parameters({"bits": bits, "beta": 1.0}, allowed)


def test_parameters_that_are_no_text_or_no_known_choice_are_named():
    allowed = {"budget": ("quick", "published"), "arch": (str,)}
    widgets.check_parameters({"budget": "quick", "arch": ""}, allowed)
    with pytest.raises(InputError, match="budget='huge' must be one of 'quick', 'published'; arch=7 must be text, in"):
        widgets.check_parameters({"budget": "huge", "arch": 7}, allowed)
    with pytest.raises(InputError, match=r"budget=\['quick'\] must be one of"):
        widgets.check_parameters({"budget": ["quick"], "arch": ""}, allowed)


@pytest.mark.parametrize(
    ("answer", "expected", "verdict"),
    [
        (None, 1.0, "e: no answer yet"),
        (..., 1.0, "e: no answer yet"),
        (1.00001, 1.0, "e: right"),
        (torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 2.0]), "e: right"),
        (2, (1.0, 3.0), "e: right"),
        (4, (1.0, 3.0), "e: got 4, expected something from 1 to 3. look"),
        (2.0, 1.0, "e: got 2, expected 1. look"),
        (torch.ones(2), 1.0, "e: the answer has shape (2,), not (). look"),
        (float("nan"), 1.0, "e: got nan, expected 1. look"),
    ],
)
def test_verdicts(answer, expected, verdict):
    assert widgets.check("e", answer, expected, hint="look") == verdict


def test_a_seed_that_is_none_is_refused():
    for seed in ("one", -1, 2**32, 1.5):
        with pytest.raises(InputError, match=f"seed={seed!r} must be a whole number from 0 to 4294967295"):
            widgets.seed_everything(seed)


def test_a_seed_fixes_every_source_of_random_numbers():
    before = torch.are_deterministic_algorithms_enabled()
    drawn = []
    for _ in range(2):
        widgets.seed_everything(5)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    torch.use_deterministic_algorithms(before)
    assert drawn[0] == drawn[1]
