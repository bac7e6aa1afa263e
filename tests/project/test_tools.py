"""The runner and the refresher of the notebooks, on tiny notebooks of our own."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


def write_notebook(path: Path, *sources: str) -> Path:
    """A notebook with a title, a parameters cell and the given code cells."""
    parameters = new_code_cell("bits: str = 'w4a4'\nseed: int = 0", metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[new_markdown_cell("# 01 · A lesson"), parameters, *map(new_code_cell, sources)])
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


@dataclass
class Done:
    code: object
    out: str
    err: str


def run_tool(name: str, *arguments: object) -> Done:
    """Run a tool's command line in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = importlib.import_module(name).main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> tuple[Done, Path]:
    """One run of a lesson that works, in a subfolder, and one that does not."""
    folder = tmp_path_factory.mktemp("lessons")
    report = (
        "import os, sys\nfrom IPython.display import JSON, display\nthreads = os.environ['OMP_NUM_THREADS']\n"
        "display(JSON(dict(bits=bits, threads=threads, python=sys.prefix, cwd=os.getcwd())))"
    )
    write_notebook(folder / "01_fails.ipynb", "step = 0.5", "1 / int(step)", "print('never reached')")
    write_notebook(folder / "solutions" / "01_works.ipynb", report, "print('see', seed)")
    output = folder / "built"
    return run_tool("tutorial", folder, "-o", output, "-p", "bits", "w2a2", "-j", 2), output


def test_a_failing_cell_is_shown_and_fails_the_run(tutorial):
    done, output = tutorial
    assert done.code == 1
    assert "FAILED 01_fails" in done.out
    assert "    1 / int(step)" in done.out
    assert "ZeroDivisionError: division by zero" in done.out
    assert "\x1b[" not in done.out
    assert "ZeroDivisionError" in (output / "01_fails.html").read_text(encoding="utf-8")


def test_a_failure_does_not_keep_the_others_from_running(tutorial):
    done, output = tutorial
    assert "ok     solutions/01_works" in done.out
    assert "1 of 2 notebooks ran" in done.out
    assert done.err == ""
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
    done = run_tool("tutorial", tmp_path, "-o", tmp_path / "built")
    assert done.code == 1
    assert "FAILED dies" in done.out
    assert "    os._exit(1)" in done.out
    assert "DeadKernelError" in done.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-p", "bitz", "w2a2"], 'lesson has no parameter "bitz"; it has bits, seed'),
        (["absent.ipynb"], "no notebook or folder"),
    ],
)
def test_wrong_arguments_end_before_anything_runs(tmp_path, arguments, complaint):
    write_notebook(tmp_path / "lesson.ipynb")
    done = run_tool("tutorial", tmp_path, "-o", tmp_path / "built", *arguments)
    assert done.code == 2
    assert complaint in done.err
    assert not (tmp_path / "built").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    write_notebook(tmp_path / "lesson.ipynb")
    (tmp_path / "built").write_text("mine")
    done = run_tool("tutorial", tmp_path, "-o", tmp_path / "built")
    assert done.code == 2
    assert "name another" in done.err
    assert (tmp_path / "built").read_text() == "mine"


def test_refreshing_twice_gives_the_same_bytes(tmp_path):
    source = "import ipywidgets\nprint('a')\nprint('b')\nipywidgets.IntSlider()"
    path = write_notebook(tmp_path / "lesson.ipynb", source)
    assert run_tool("refresh", path).code == 0
    first = path.read_bytes()
    assert run_tool("refresh", path).code == 0
    assert path.read_bytes() == first
    notebook = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert notebook.cells[2].outputs[0].text == "a\nb\n"
    assert set(notebook.metadata) == {"dfqlib", "kernelspec", "language_info"}


def test_refreshing_leaves_a_failing_notebook_as_it_was(tmp_path):
    path = write_notebook(tmp_path / "lesson.ipynb", "print('new output')", "raise SystemError('broken')")
    before = path.read_bytes()
    done = run_tool("refresh", path)
    assert done.code == 1
    assert "broken" in done.out
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["lesson.ipynb"]


# refresh --check


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A notebook with the outputs of its code: a line, a time, a picture, and a cell that is not compared."""
    picture = (
        "import matplotlib.pyplot as plt\nfrom IPython.display import Image\nimport io\nfile = io.BytesIO()\n"
        "plt.bar([1, 2], [3, 4])\nplt.savefig(file, format='png')\nImage(file.getvalue())"
    )
    path = write_notebook(
        tmp_path_factory.mktemp("fresh") / "lesson.ipynb",
        "print('width', bits)",
        "import time\nprint(f'took {time.perf_counter():.3f} s')",
        picture,
        "print(time.perf_counter())",
    )
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata["tags"] = ["nbval-ignore-output"]
    nbformat.write(notebook, path)
    assert run_tool("refresh", path).code == 0
    return path


@pytest.fixture
def kept(fresh, tmp_path):
    """A copy of that notebook to spoil, and a function that checks it."""
    path = tmp_path / "lesson.ipynb"
    notebook = nbformat.read(fresh, as_version=4)

    def check(*options: str) -> Done:
        nbformat.write(notebook, path)
        before = path.read_bytes()
        done = run_tool("refresh", "--check", path, *options)
        assert path.read_bytes() == before
        return done

    return notebook, check


def test_times_and_uncompared_numbers_are_not_stale(kept):
    _, check = kept
    done = check()
    assert done.code == 0
    assert done.out.startswith("lesson ")
    done = check("--exact")
    assert done.code == 1
    assert [line.split(",")[0] for line in done.out.splitlines()[1:]] == ["  cell [3]", "  cell [5]"]


def test_stale_cells_are_named_with_what_differs(kept):
    notebook, check = kept
    cells = notebook.cells[1:]
    cells[1].outputs[0].text = "width w2a2\n"
    cells[3].outputs[0].data["image/png"] = "another"  # of another processor, perhaps
    cells[4].outputs = []
    done = check()
    assert done.code == 1
    assert done.out.splitlines()[0].startswith("STALE lesson")
    assert done.out.splitlines()[1:] == [
        "  cell [2], \"print('width', bits)\": text: 'width w2a2' kept, 'width w4a4' made",
        "  cell [5], 'print(time.perf_counter())': another kind of output: [] kept, ['stdout'] made",
    ]


def test_notebooks_are_refreshed_side_by_side(tmp_path):
    paths = [write_notebook(tmp_path / f"{name}.ipynb", f"print({name!r})") for name in "abc"]
    done = run_tool("refresh", tmp_path, "-j", 3)
    assert done.code == 0
    assert sorted(line.split()[0] for line in done.out.splitlines()) == ["a", "b", "c"]
    for path in paths:
        assert nbformat.read(path, as_version=4).cells[2].outputs[0].text == f"{path.stem}\n"


# lowest


def test_floors_are_printed_as_constraints_on_the_lowest_python_alone(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 11, 2))
    done = run_tool("lowest", "export")
    assert (done.code, done.err) == (0, "")
    assert "torch==2.6" in done.out.splitlines()
    assert all("==" in line for line in done.out.splitlines())
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    done = run_tool("lowest", "export")
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith("on 3.13: remove .venv-lowest, then make test-lowest PYTHON=python3.11\n")
