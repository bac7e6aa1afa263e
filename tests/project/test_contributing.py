"""The recipe that CONTRIBUTING.md shows is complete: saved as a file of ``recipes/`` it quantizes the digits."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import dfqlib
from dfqlib import recipes
from dfqlib.errors import InputError
from dfqlib.network.inference import Batches

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
SHAPE = (1, 16, 16)


def example() -> tuple[str, str]:
    """The name under which CONTRIBUTING.md saves the recipe, and its code."""
    (name,) = re.findall(r"Saved as `dfqlib/recipes/(\w+)\.py`", TEXT)
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return name, code


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[str]:
    """The example where recipes are found, for the length of a test."""
    name, code = example()
    (tmp_path / f"{name}.py").write_text(code)
    recipes.__path__.append(str(tmp_path))
    yield name
    recipes.__path__.remove(str(tmp_path))
    sys.modules.pop(f"dfqlib.recipes.{name}", None)
    vars(recipes).pop(name, None)


def test_the_example_is_found_by_its_name_and_beats_calibration(
    recipe: str, teacher: nn.Module, digits: Batches
) -> None:
    assert recipe in recipes.names()
    small = {"images": 64, "synthesis_steps": 40, "steps": 40, "progress": False}
    report = dfqlib.quantize(teacher, SHAPE, "w3a3", recipe=recipe, **small)
    assert report.settings["recipe"] == recipe
    assert [row["phase"] for row in report.history][:: len(report.history) - 1] == ["synthesis", "fine-tuning"]
    assert report.calibrated is not None
    assert dfqlib.evaluate(report.model, digits) > dfqlib.evaluate(report.calibrated, digits) + 3
    again = dfqlib.quantize(teacher, SHAPE, "w3a3", recipe=recipe, **small)
    assert (report.images == again.images).all()


def test_the_example_has_what_comes_with_a_recipe(recipe: str, teacher: nn.Module) -> None:
    with pytest.raises(InputError, match="images=1 must be a whole number from 2"):
        dfqlib.quantize(teacher, SHAPE, recipe=recipe, images=1)
    with pytest.raises(InputError, match=f'colour= is no setting of recipe="{recipe}"; it has images, '):
        dfqlib.quantize(teacher, SHAPE, recipe=recipe, colour=1)
    with pytest.raises(InputError, match=f"recipe='{recipe}' reads BatchNorm statistics and model has none"):
        dfqlib.quantize(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), SHAPE, recipe=recipe)


def test_the_example_leaves_nothing_behind() -> None:
    assert example()[0] not in recipes.names()
