"""Seeds, checks of parameters, panels of sliders and checks of exercises for the lessons.

ipywidgets is imported inside the functions. Taught in notebook 01.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from dfqlib.errors import InputError
from dfqlib.lessons import plots

_MESSAGE = '<div style="padding:.4em;border-left:4px solid #D55E00;background:#FFF6EE">{}</div>'


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, and use PyTorch's deterministic algorithms.

    Raises:
        InputError: ``seed`` is not a whole number from 0 to 2³² - 1.
    """
    check_parameters({"seed": seed}, {"seed": (int, 0, 2**32 - 1)})
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def panel(compute: Callable[..., Any], view: Callable[[Any], Any], controls: Mapping[str, Any]) -> Any:
    """Controls above a figure that is drawn again when one of them changes.

    An ``InputError`` of ``compute`` is shown as a message above the last figure; other errors are raised.

    Args:
        compute: pure function from the controls' values, by name, to a result.
        view: from the result to a matplotlib figure.
        controls: name → ipywidgets control with a ``value``.

    Returns:
        An ipywidgets VBox with the attributes ``controls`` (by name), ``message`` (an HTML widget), ``image`` (the
        figure) and ``result`` (the last one of ``compute``).
    """
    from html import escape

    import ipywidgets

    message, image = ipywidgets.HTML(), ipywidgets.Image(format="png")
    box = ipywidgets.VBox([*controls.values(), message, image])
    box.controls, box.message, box.image, box.result = dict(controls), message, image, None

    def update(_: object = None) -> None:
        try:
            box.result = compute(**{name: control.value for name, control in controls.items()})
        except InputError as error:
            message.value = _MESSAGE.format(escape(str(error)))
            return
        message.value = ""
        image.value = plots.png(view(box.result))

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return box


def slider(value: float, low: float, high: float, step: float, description: str, *, log: bool = False) -> Any:
    """A slider that reports its value on release, an integer one when all of its numbers are integers.

    Args:
        value: initial value.
        low: smallest value, or its exponent to base 10 if ``log``.
        high: largest value, likewise.
        step: increment, likewise.
        description: label, with the unit if there is one.
        log: logarithmic scale.
    """
    import ipywidgets

    kind = ipywidgets.FloatSlider
    if log:
        kind = ipywidgets.FloatLogSlider
    elif all(isinstance(number, int) for number in (value, low, high, step)):
        kind = ipywidgets.IntSlider
    layout, style = ipywidgets.Layout(width="28em"), {"description_width": "13em"}
    limits = {"min": low, "max": high, "step": step}
    return kind(value=value, **limits, description=description, continuous_update=False, layout=layout, style=style)


def check_parameters(given: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Check the types and ranges of a lesson's parameters.

    Args:
        given: name → value.
        allowed: name → (int or float, smallest, largest), where an int passes for a float; (str,) for any text; or
            the allowed texts.

    Raises:
        InputError: names each invalid parameter, its value and the allowed ones.
    """
    wrong = []
    for name, limits in allowed.items():
        value, (kind, *rest) = given[name], limits
        if isinstance(kind, str):
            right, wish = value in limits, f"one of {', '.join(map(repr, limits))}"
        elif kind is str:
            right, wish = isinstance(value, str), "text, in quotes"
        else:
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            right = number and rest[0] <= value <= rest[1]
            wish = f"a {'whole ' if kind is int else ''}number from {rest[0]} to {rest[1]}"
        if not right:
            wrong.append(f"{name}={value!r} must be {wish}")
    if wrong:
        raise InputError("; ".join(wrong))


def check(exercise: str, answer: Any, expected: Any, *, hint: str, tolerance: float = 1e-4) -> str:
    """Check an answer to an exercise; returns a line that says whether it is right, with a hint if it is not.

    Args:
        exercise: its name.
        answer: what the reader's function returned; None or ``...`` for no answer yet.
        expected: number or tensor, or a pair (smallest, largest) for a range.
        hint: shown with a wrong answer.
        tolerance: relative and absolute, for a number or tensor.
    """
    if answer is None or answer is ...:
        return f"{exercise}: no answer yet"
    got = torch.as_tensor(answer, dtype=torch.float64).detach()
    if isinstance(expected, tuple):
        low, high = expected
        right, wanted = bool(((got >= low) & (got <= high)).all()), f"something from {low:g} to {high:g}"
    else:
        target = torch.as_tensor(expected, dtype=torch.float64).detach()
        if got.shape != target.shape:
            return f"{exercise}: the answer has shape {tuple(got.shape)}, not {tuple(target.shape)}. {hint}"
        right, wanted = torch.allclose(got, target, tolerance, tolerance), _short(target)
    return f"{exercise}: right" if right else f"{exercise}: got {_short(got)}, expected {wanted}. {hint}"


def _short(values: torch.Tensor) -> str:
    return f"{values.item():.4g}" if values.numel() == 1 else f"values around {values.mean().item():.4g}"
