"""The runner and the refresher of the notebooks, on tiny notebooks of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def write_notebook(path: Path, *sources: str) -> Path:
    """A notebook with a title, a parameters cell and the given code cells."""
    parameters = new_code_cell("bits: str = 'w4a4'\nseed: int = 0", metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[new_markdown_cell("# 01 · A lesson"), parameters, *map(new_code_cell, sources)])
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run of a lesson that works, in a subfolder, and one that does not."""
    folder = tmp_path_factory.mktemp("lessons")
    report = (
        "import os, sys\nfrom IPython.display import JSON, display\nthreads = os.environ['OMP_NUM_THREADS']\n"
        "display(JSON(dict(bits=bits, threads=threads, python=sys.prefix, cwd=os.getcwd())))"
    )
    write_notebook(folder / "01_fails.ipynb", "step = 0.5", "1 / int(step)", "print('never reached')")
    write_notebook(folder / "solutions" / "01_works.ipynb", report, "print('see', seed)")
    output = folder / "built"
    return run_tool("tutorial.py", folder, "-o", output, "-p", "bits", "w2a2", "-j", 2), output


def test_a_failing_cell_is_shown_and_fails_the_run(tutorial):
    done, output = tutorial
    assert done.returncode == 1
    assert "FAILED 01_fails" in done.stdout
    assert "    1 / int(step)" in done.stdout
    assert "ZeroDivisionError: division by zero" in done.stdout
    assert "\x1b[" not in done.stdout
    assert "ZeroDivisionError" in (output / "01_fails.html").read_text(encoding="utf-8")


def test_a_failure_does_not_keep_the_others_from_running(tutorial):
    done, output = tutorial
    assert "ok     solutions/01_works" in done.stdout
    assert "1 of 2 notebooks ran" in done.stdout
    assert done.stderr == ""
    assert "A lesson" in (output / "solutions" / "01_works.html").read_text(encoding="utf-8")
    index = (output / "index.html").read_text(encoding="utf-8")
    assert 'href="01_fails.html"' in index
    assert 'href="solutions/01_works.html"' in index


def test_results_carry_parameters_versions_and_what_was_displayed(tutorial):
    _, output = tutorial
    record = json.loads((output / "solutions" / "01_works.json").read_text())
    assert record["parameters"] == {"bits": "w2a2", "seed": 0}
    assert record["error"] is None
    assert record["versions"]["torch"]
    # The kernel is this environment's, in the notebook's own folder, with one thread and the new parameter.
    assert record["results"] == {
        "bits": "w2a2",
        "threads": "1",
        "python": sys.prefix,
        "cwd": str(output.parent / "solutions"),
    }


def test_a_dead_kernel_shows_the_cell_it_died_in(tmp_path):
    write_notebook(tmp_path / "dies.ipynb", "import os", "os._exit(1)", "print('never reached')")
    done = run_tool("tutorial.py", tmp_path, "-o", tmp_path / "built")
    assert done.returncode == 1
    assert "FAILED dies" in done.stdout
    assert "    os._exit(1)" in done.stdout
    assert "DeadKernelError" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-p", "bitz", "w2a2"], "lesson has no parameter 'bitz'; it has bits, seed"),
        (["absent.ipynb"], "no notebook or folder"),
    ],
)
def test_wrong_arguments_end_before_anything_runs(tmp_path, arguments, complaint):
    write_notebook(tmp_path / "lesson.ipynb")
    done = run_tool("tutorial.py", tmp_path, "-o", tmp_path / "built", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not (tmp_path / "built").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    write_notebook(tmp_path / "lesson.ipynb")
    (tmp_path / "built").write_text("mine")
    done = run_tool("tutorial.py", tmp_path, "-o", tmp_path / "built")
    assert done.returncode == 2
    assert "name another" in done.stderr
    assert (tmp_path / "built").read_text() == "mine"


def test_refreshing_twice_gives_the_same_bytes(tmp_path):
    source = "import ipywidgets\nprint('a')\nprint('b')\nipywidgets.IntSlider()"
    path = write_notebook(tmp_path / "lesson.ipynb", source)
    assert run_tool("refresh.py", path).returncode == 0
    first = path.read_bytes()
    assert run_tool("refresh.py", path).returncode == 0
    assert path.read_bytes() == first
    notebook = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert notebook.cells[2].outputs[0].text == "a\nb\n"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_refreshing_leaves_a_failing_notebook_as_it_was(tmp_path):
    path = write_notebook(tmp_path / "lesson.ipynb", "print('new output')", "raise SystemError('broken')")
    before = path.read_bytes()
    done = run_tool("refresh.py", path)
    assert done.returncode == 1
    assert "broken" in done.stdout
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["lesson.ipynb"]
