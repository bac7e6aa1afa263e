"""Settings check and document themselves, however their types are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Literal

import pytest

from dfqlib import recipes
from dfqlib.errors import InputError
from dfqlib.training.settings import BaseSettings, setting


@dataclass(frozen=True)
class Short(BaseSettings):
    """A few settings, whose annotations are strings here."""

    steps: int = setting(3, "iterations", low=1)
    share: float = setting(0.5, "a share", high=1)
    flip: bool = setting(True, "mirror images")
    clip: Literal["max", "mse"] = setting("mse", "criterion")


@dataclass(frozen=True)
class Longer(Short):
    """The same with another default, and one more."""

    steps: int = 30
    lr: float = setting(0.1, "learning rate")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"steps": True}, "steps=True must be a whole number"),
        ({"share": 1.5}, "share=1.5 must be a number from 0 to 1"),
        ({"share": math.nan}, "share=nan must be a number"),
        ({"share": math.inf}, "share=inf must be finite"),
        ({"flip": "no"}, "flip='no' must be True or False"),
        ({"clip": "zzz"}, 'clip=\'zzz\' must be "max" or "mse"'),
    ],
)
@pytest.mark.parametrize("kind", [Short, Longer])
def test_a_value_of_another_type_or_out_of_bounds_is_refused(kind: Any, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**changes)


def test_a_new_default_keeps_meaning_and_bounds_and_all_are_listed() -> None:
    assert Longer() == Longer(steps=30, lr=0.1, share=0.5)
    assert Longer.meanings["steps"] == "iterations (at least 1)"
    assert '    clip: criterion ("max" or "mse").\n    lr: learning rate (at least 0).' in (Longer.__doc__ or "")
    assert "lr" not in Short.meanings


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_setting_of_every_recipe_says_what_it_means(recipe: str) -> None:
    settings: Any = import_module(f"dfqlib.recipes.{recipe}").Settings
    assert list(settings.meanings) == [item.name for item in fields(settings)]
    assert all(settings.meanings.values())
    assert all(f"    {name}: " in settings.__doc__ for name in settings.meanings)
