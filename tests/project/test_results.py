"""Figures in the README come from results/*.json, which say how they were measured."""

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "results").glob("accuracy_*.json"))


def test_the_readme_shows_what_was_measured() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_how_it_was_measured(path: Path) -> None:
    cases = json.loads(path.read_text())["cases"]
    assert cases
    for entry in cases.values():
        assert entry["command"].startswith("python benchmarks/accuracy.py")
        assert entry["budget"] in ("quick", "published")
        assert entry["versions"]["torch"]
        assert entry["device"]
        seeds = [run["settings"]["seed"] for run in entry["runs"]]
        assert entry["summary"]["seeds"] == seeds
        mean = sum(run["difference"] for run in entry["runs"]) / len(seeds)
        assert entry["summary"]["difference"] == pytest.approx(mean)


def test_lesson_10_shows_the_times_that_were_measured() -> None:
    runs = [run for run in json.loads((ROOT / "results" / "export.json").read_text())["runs"] if run["bits"] == "w4a4"]
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
