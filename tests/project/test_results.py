"""Figures in the README come from results/*.json, which say how they were measured."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = [path for path in sorted((ROOT / "results").glob("*.json")) if not path.stem.startswith(("claims", "muta"))]


def test_the_readme_shows_what_was_measured() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_row_says_how_it_was_measured(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    assert rows
    for row in rows:
        assert re.match(r"python benchmarks/\w+\.py", row["command"])
        assert row["versions"]["torch"]
        assert row["device"]
        assert "settings" in row
        assert "commit" in row or row["date"] < "2026-12"
    identities = [json.dumps(row["job"], sort_keys=True) for row in rows]
    assert len(identities) == len(set(identities))


def test_differences_are_paired_with_the_teacher() -> None:
    rows = [row for path in RESULTS if path.stem.startswith("accuracy") for row in json.loads(path.read_text())["rows"]]
    compared = [row for row in rows if "teacher_top1" in row]
    assert compared
    for row in compared:
        assert row["difference"] == pytest.approx(row["top1"] - row["teacher_top1"], abs=1e-4)


def test_lesson_10_shows_the_times_that_were_measured() -> None:
    runs = [
        run
        for run in json.loads((ROOT / "results" / "export.json").read_text())["rows"]
        if run["job"]["bits"] == "w4a4"
    ]
    notebook = nbformat.read(ROOT / "notebooks" / "10_deploy.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.source.startswith("RECORDED = ")]
    recorded = ast.literal_eval(ast.parse(cell.source).body[0].value)  # type: ignore[attr-defined]
    engines = {
        "PyTorch\nFP32": ("int8", "PyTorch FP32"),
        "ONNX Runtime\nFP32": ("int8", "ONNX Runtime FP32"),
        "int8 file": ("int8", "integer file"),
        "int4 file": ("int4", "integer file"),
    }
    assert set(recorded) == set(engines)
    for name, (container, engine) in engines.items():
        measured = [
            statistics.median(run[container]["milliseconds"][engine][batch] for run in runs) for batch in ("1", "64")
        ]
        assert recorded[name] == pytest.approx(measured, rel=0.02)
