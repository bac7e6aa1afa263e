"""Figures in the README come from results/*.json, which say how they were measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
