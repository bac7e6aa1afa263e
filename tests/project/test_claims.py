"""The tool that tells on how many seeds and processors a lesson's claims hold."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import claims
import nbformat
import numpy as np
import pytest
import torch

NAMES = {
    "_gap": claims._gap,
    "a": 3.0,
    "t": torch.tensor([1.0, 5.0], requires_grad=True),
    "n": np.array([2.0, 4.0]),
    "xs": [1, 2, 3],
}


@pytest.mark.parametrize(
    ("condition", "margin"),
    [
        ("a > 1", 2.0),
        ("1 < a < 3.5", 0.5),
        ("abs(a - 2) < 0.5", -0.5),
        ("(t > 0.25).all()", 0.75),
        ("(n >= 1).all(axis=None)", 1.0),
        ("a > 1 and a < 10", 2.0),
        ("a > 5 or a < 10", 7.0),
        ("all(x < a + 1 for x in xs)", 1.0),
        ("not a > 1", None),
        ("a == 3", None),
        ("isinstance(a, float)", None),
    ],
)
def test_the_margin_is_how_far_the_nearest_comparison_is_from_failing(condition: str, margin: float | None) -> None:
    expression = claims.smallest_margin(ast.parse(condition, mode="eval").body)
    if margin is None:
        assert expression is None
        return
    assert expression is not None
    code = compile(ast.fix_missing_locations(ast.Expression(expression)), "condition", "eval")
    assert math.isclose(eval(code, dict(NAMES)), margin)


@pytest.fixture
def lesson(tmp_path: Path) -> Path:
    """A lesson that claims three things of its seed, one of them wrongly of odd ones."""
    notebook = nbformat.v4.new_notebook()
    parameters = nbformat.v4.new_code_cell("seed: int = 0  # of all")
    parameters.metadata["tags"] = ["parameters"]
    cells = [
        "import inspect\n\ndef half(x):\n    return x / 2",
        "assert half(seed) < 2\nassert 'x / 2' in inspect.getsource(half)",
    ]
    notebook.cells = [parameters, *map(nbformat.v4.new_code_cell, [*cells, "assert seed % 2 == 0"])]
    nbformat.write(notebook, tmp_path / "lesson.ipynb")
    return tmp_path / "lesson.ipynb"


def test_goes_on_after_a_claim_that_fails_and_keeps_every_run(
    lesson: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "claims.json"
    arguments = [str(lesson), "--seeds", "0-1", "--output", str(output)]
    assert claims.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "cell [4] fails: seed % 2 == 0" in printed
    runs = json.loads(output.read_text())["runs"]
    assert sorted(runs) == ["lesson seed 0 this 1", "lesson seed 1 this 1"]
    assert [each["holds"] for each in runs["lesson seed 1 this 1"]["claims"]] == [True, True, False]
    assert runs["lesson seed 1 this 1"]["claims"][0]["margin"] == 1.5
    table = output.with_suffix(".md").read_text()
    assert "| 4 | `seed % 2 == 0` | 1 of 2 |" in table
    assert "| 3 | `half(seed) < 2` | 2 of 2 | 1.5 | 1.75 ± 0.25 |" in table
    claims.main(arguments)
    assert "lesson" not in capsys.readouterr().out  # nothing is run twice


def test_a_notebook_that_dies_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell("import os\nos.abort()")]
    nbformat.write(notebook, tmp_path / "dies.ipynb")
    assert claims.main([str(tmp_path / "dies.ipynb"), "--seeds", "0", "--output", str(tmp_path / "out.json")]) == 1
    assert "ended with -6" in capsys.readouterr().out
