"""`dfqlib rerun` on tiny notebooks: what it leaves, what it survives, and what it refuses before anything runs."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dfqlib.__main__ import main
from dfqlib.errors import InputError
from dfqlib.lessons.reruns import Parameter, read_notebook, read_parameters, values_for
from dfqlib.lessons.reruns.command import flatten
from dfqlib.lessons.reruns.execution import displayed_json
from dfqlib.lessons.reruns.parameters import read_grid

PARAMETERS = """\
seed: int = 0  # of everything
rate: float = 0.5  # of learning
bits: str = "w4a4"  # widths
flip: bool = False  # images
checkpoint: str = ""  # weights
"""
REPORT = """\
import os
from IPython.display import JSON, display
display(JSON({"seed": seed + 1, "top1": {"FP32": 9.5, "by seed": [seed, float("inf")]}, "folder": os.getcwd()}))
"""


def write_notebook(path: Path, *sources: str, parameters: str = PARAMETERS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A lesson"), tagged, *map(new_code_cell, sources)]), path)
    return path


def outputs(path: Path) -> list[Any]:
    return [cell.outputs for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture
def rerun(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of the command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["rerun", *map(str, arguments)])
        return code, *capfd.readouterr()

    return run


def test_a_run_leaves_notebook_page_and_results(rerun: Callable[..., Any], tmp_path: Path) -> None:
    lesson = write_notebook(tmp_path / "lessons" / "01_lesson.ipynb", REPORT, "print(bits, rate, flip)")
    before = lesson.read_bytes()
    parameters = ("-p", "seed", "-3", "-p", "bits", "2", "-p", "rate", "1", "-p", "flip", "true")
    code, out, err = rerun(lesson, *parameters, "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert out.startswith("ok     01_lesson")
    assert lesson.read_bytes() == before
    names = {f"01_lesson.{suffix}" for suffix in ("ipynb", "html", "json")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    record = json.loads((tmp_path / "out" / "01_lesson.json").read_text())
    assert record["parameters"] == {"seed": -3, "rate": 1.0, "bits": "2", "flip": True, "checkpoint": ""}
    assert record["results"]["seed"] == -2
    assert record["results"]["top1"] == {"FP32": 9.5, "by seed": [-3, "inf"]}  # JSON has no infinity
    assert record["results"]["folder"] == str(lesson.parent)
    assert record["error"] is None
    assert record["seconds"] > 0
    assert record["peak_gb"] > 0 if sys.platform == "linux" else record["peak_gb"] is None
    assert record["versions"]["torch"]
    assert outputs(tmp_path / "out" / "01_lesson.ipynb")[-1][0].text == "2 1.0 True\n"
    assert "A lesson" in (tmp_path / "out" / "01_lesson.html").read_text(encoding="utf-8")


def test_a_grid_goes_on_after_a_failure_and_ends_in_one_table(rerun: Callable[..., Any], tmp_path: Path) -> None:
    lesson = write_notebook(tmp_path / "lesson.ipynb", "print('so far')", "1 / (seed - 1)", REPORT)
    (tmp_path / "grid.yml").write_text("bits: [w4a4, w2a2]\nseed: [1, 2]\n")
    arguments = (lesson, "--grid", tmp_path / "grid.yml", "-p", "rate", "1e-3", "--output", tmp_path / "out")
    code, out, _ = rerun(*arguments, "--jobs", 2)
    assert code == 1
    assert out.count("FAILED") == 2
    assert "ZeroDivisionError" in out
    assert "2 of 4 ran; written: " in out
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [f"lesson_{number:02}" for number in (1, 2, 3, 4)]
    assert [(row["bits"], row["seed"], row["rate"]) for row in rows] == [
        ("w4a4", "1", "0.001"), ("w4a4", "2", "0.001"), ("w2a2", "1", "0.001"), ("w2a2", "2", "0.001"),
    ]  # fmt: skip
    # A number called as a parameter has a column of its own; a run that failed has none.
    assert [row["results.seed"] for row in rows] == ["", "3", "", "3"]
    assert [row["top1.FP32"] for row in rows] == ["", "9.5", "", "9.5"]
    assert [row["error"] for row in rows] == ["ZeroDivisionError: division by zero", ""] * 2
    table = json.loads((tmp_path / "out" / "results.json").read_text())
    assert table[1]["top1.by seed.0"] == 2
    assert table[0]["error"] == rows[0]["error"]
    kept = outputs(tmp_path / "out" / "lesson_01.ipynb")
    assert "so far" in json.dumps(kept)
    assert "ZeroDivisionError" in json.dumps(kept)
    assert not list((tmp_path / "out").glob(".*"))


def test_input_that_a_lesson_refuses_is_one_line_in_it(rerun: Callable[..., Any], tmp_path: Path) -> None:
    check = "from dfqlib.lessons import widgets\nwidgets.check_parameters({'seed': seed}, {'seed': (int, 0, 5)})"
    code, out, _ = rerun(
        write_notebook(tmp_path / "lesson.ipynb", check), "-p", "seed", 9, "--output", tmp_path / "out"
    )
    message = "InputError: seed=9 must be a whole number from 0 to 5"
    assert code == 1
    assert message in out.splitlines()
    assert "Traceback" not in out
    (error,) = outputs(tmp_path / "out" / "lesson.ipynb")[-1]
    assert error.traceback == [message]


def test_a_killed_kernel_costs_its_own_run_only(rerun: Callable[..., Any], tmp_path: Path) -> None:
    kill = "import os\nif seed:\n    os.kill(os.getpid(), 9)"
    lesson = write_notebook(tmp_path / "lesson.ipynb", "print('so far')", kill, REPORT)
    (tmp_path / "grid.yml").write_text("- seed: 1\n- {seed: 0, bits: w2a2}\n")
    code, out, err = rerun(lesson, "--grid", tmp_path / "grid.yml", "--output", tmp_path / "out")
    assert (code, err) == (1, "")
    assert "in cell [4]:\n    import os" in out
    assert "DeadKernelError: Kernel died; is there enough memory?" in out
    assert "1 of 2 ran" in out
    assert "so far" in json.dumps(outputs(tmp_path / "out" / "lesson_01.ipynb"))
    assert json.loads((tmp_path / "out" / "lesson_02.json").read_text())["parameters"]["bits"] == "w2a2"
    assert not list((tmp_path / "out").glob(".*"))


def test_a_cell_past_its_time_is_named(rerun: Callable[..., Any], tmp_path: Path) -> None:
    lesson = write_notebook(tmp_path / "lesson.ipynb", "import time\ntime.sleep(60)", "print('never')")
    code, out, err = rerun(lesson, "--cell-timeout", 5, "--output", tmp_path / "out")
    assert (code, err) == (1, "")
    assert "in cell [2]:\n    import time\n    time.sleep(60)\nCellTimeoutError: " in out


def test_ctrl_c_leaves_the_notebook_as_far_as_it_came(tmp_path: Path) -> None:
    wait = "from pathlib import Path\nPath('reached').touch()\nimport time\ntime.sleep(60)"
    lesson = write_notebook(tmp_path / "lesson.ipynb", "print('so far')", wait, "print('never')")
    command = [sys.executable, "-m", "dfqlib", "rerun", str(lesson), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "reached").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "dfqlib: interrupted; nothing more is written\n"
    kept = json.dumps(outputs(tmp_path / "out" / "lesson.ipynb"))
    assert "so far" in kept
    assert "never" not in kept
    assert json.loads((tmp_path / "out" / "lesson.json").read_text())["error"] == "interrupted"


# What is refused, before anything runs


@pytest.fixture
def refused(rerun: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message of an error; nothing was run or written."""
    monkeypatch.setattr("dfqlib.lessons.reruns.command.run_jobs", lambda *_, **__: pytest.fail("something ran"))

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = rerun(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("dfqlib: error: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return str(err)

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("-p", "bitz", "w2a2"),
            'lesson has no parameter "bitz"; it has seed, rate, bits, flip, checkpoint; did you mean "bits"?\n',
        ),
        (("-p", "seed", "few"), "seed='few' must be a whole number, as its default 0 is"),
        (("-p", "seed", "2.5"), "seed='2.5' must be a whole number"),
        (("-p", "seed", "1e3"), "seed='1e3' must be a whole number"),
        (("-p", "seed", "nan"), "seed='nan' must be a whole number"),
        (("-p", "rate", "inf"), "rate='inf' must be a finite number"),
        (("-p", "rate", "nan"), "rate='nan' must be a finite number"),
        (("-p", "rate", "1e999"), "rate='1e999' must be a finite number"),
        (("-p", "rate", f"1{400 * '0'}"), "must be a finite number"),
        (("-p", "flip", "1"), "flip='1' must be true or false"),
        (("-p", "seed", "1", "-p", "seed", "2"), 'parameter "seed" is given twice'),
        (("-p", "seed"), 'argument -p/--parameter: expected 2 arguments; see "dfqlib rerun --help"'),
        (("--jobs", "0"), "--jobs=0 must be at least 1"),
        (("--cell-timeout", "-1"), "--cell-timeout=-1 must be at least 1"),
        (("--grid", "absent.yml"), '--grid="absent.yml" cannot be read (No such file or directory)'),
    ],
)
def test_parameters_that_do_not_fit(
    options: tuple[str, ...], message: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    lesson = write_notebook(tmp_path / "lesson.ipynb")
    assert message in refused(lesson, *options, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no run"),
        ("bits: []", "names no run"),
        ("w4a4", "names no run"),
        ("- w4a4", "names no run"),
        ("- {}", "names no run"),
        ("2: [3]", 'has no parameter "2"'),
        ("seed: 1\nbits: w2a2\nseed: 2", 'gives "seed" twice in one mapping; leave one'),
        ("- {seed: 1, bits: w2a2, seed: 2}", 'gives "seed" twice in one mapping; leave one'),
        ("seed: [1, .inf]", "seed=inf must be a whole number"),
        ("flip: .nan", "flip=nan must be true or false"),
        ("bits: [w4a4", "is no YAML"),
        ("bitz: [w4a4]", 'has no parameter "bitz"'),
        ("bits: [4]", "bits=4 must be text, in quotes"),
        ("flip: [yes, 3]", "flip=3 must be true or false"),
        ("seed: [true]", "seed=True must be a whole number"),
        ("rate: [0.1, 0.2]", 'parameter "rate" is given by -p and in the grid'),
    ],
)
def test_grids_that_do_not_fit(text: str, message: str, refused: Callable[..., str], tmp_path: Path) -> None:
    lesson = write_notebook(tmp_path / "lesson.ipynb")
    (tmp_path / "grid.yml").write_text(text)
    arguments = ("-p", "rate", "0.5", "--grid", tmp_path / "grid.yml", "--output", tmp_path / "out")
    assert message in refused(lesson, *arguments)


def test_notebooks_and_outputs_that_cannot_be_used(refused: Callable[..., str], tmp_path: Path) -> None:
    lesson = write_notebook(tmp_path / "lesson.ipynb")
    assert "does not exist; name an .ipynb file" in refused(tmp_path / "absent.ipynb", "--output", tmp_path / "out")
    (tmp_path / "text.ipynb").write_text("# no notebook")
    assert "is no Jupyter notebook" in refused(tmp_path / "text.ipynb", "--output", tmp_path / "out")
    broken = write_notebook(tmp_path / "broken.ipynb", parameters="seed = = 3")
    assert "parameters cell is no Python" in refused(broken, "--output", tmp_path / "out")
    for line in ("x, y = 1, 2", "x += 1", "settings['x'] = 1", "settings.x: int = 1", "if x:\n    y = 1"):
        odd = write_notebook(tmp_path / "odd.ipynb", parameters=f"z = 0\n{line}")
        message = f"parameters cell has `{line.splitlines()[0]}`; write one `name = value` line per parameter"
        assert message in refused(odd, "-p", "z", "1", "--output", tmp_path / "out")
    assert "which would be replaced; name another" in refused(lesson, "--output", tmp_path)
    assert "cannot be a folder (" in refused(lesson, "--output", tmp_path / "text.ipynb")


def test_a_path_from_the_current_folder_is_refused_with_the_right_one(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = write_notebook(tmp_path / "lessons" / "lesson.ipynb")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "q.pt").touch()
    monkeypatch.chdir(tmp_path)
    for given, right in {"data/q.pt": "../data/q.pt", "folder:data": "folder:../data"}.items():
        assert f'starts in the notebook\'s: "{right}"' in refused(lesson, "-p", "checkpoint", given, "--output", "out")
        known = read_parameters(read_notebook(lesson))
        assert values_for(known, {"checkpoint": right}, lesson) == {"checkpoint": right}


def test_without_the_extra_it_says_what_to_install(
    rerun: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = write_notebook(tmp_path / "lesson.ipynb")
    monkeypatch.setitem(sys.modules, "papermill", None)
    code, out, err = rerun(lesson, "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err == 'dfqlib: error: running notebooks needs the package papermill; pip install "dfqlib[notebooks]"\n'


# The parts


def test_parameters_are_read_with_their_types() -> None:
    source = 'a: int = 1\nb = 2.5\nc = "x"\nd: list[int] = [1]\ne = 3 * seconds\nf: float = 1\nprint(a)\ng: int'
    source += '\nimport os\nh: str = "a=b#c"  # text\ni = j = True'
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    found = read_parameters(new_notebook(cells=[new_code_cell("z = 1"), cell]))
    assert found == {
        "a": (int, 1), "b": (float, 2.5), "c": (str, "x"), "d": (None, [1]), "e": (None, "3 * seconds"),
        "f": (float, 1), "h": (str, "a=b#c"), "i": (bool, True), "j": (bool, True),
    }  # fmt: skip
    assert read_parameters(new_notebook(cells=[new_code_cell("z = 1")])) == {}


def test_what_papermill_does_not_replace_is_no_parameter() -> None:
    cells = [new_code_cell(source, metadata={"tags": ["parameters"]}) for source in ("a = 1", "b = 2")]
    assert list(read_parameters(new_notebook(cells=cells))) == ["a"]


def test_what_has_no_declared_type_takes_any_literal() -> None:
    known = {"d": Parameter(None, [1])}
    for given, expected in {"[1, 2]": [1, 2], "None": None, "some words": "some words"}.items():
        assert values_for(known, {"d": given}, Path("lesson.ipynb")) == {"d": expected}
    for given in ("(1, 2)", "{1}", "b'x'", "1j"):  # papermill would pass a string
        with pytest.raises(InputError, match="must be a number, text, a list, a dictionary or None"):
            values_for(known, {"d": given}, Path("lesson.ipynb"))


def test_numbers_are_read_as_python_reads_them() -> None:
    known = {"rate": Parameter(float, 0.5), "seed": Parameter(int, 0)}
    for text, value in {"1e3": 1000.0, "-1e-3": -0.001, "1_000": 1000.0, "7": 7.0, ".5": 0.5}.items():
        assert values_for(known, {"rate": text}, Path("lesson.ipynb")) == {"rate": value}
    for text, value in {"1_000": 1000, "0x10": 16, "-3": -3, " 4 ": 4}.items():
        assert values_for(known, {"seed": text}, Path("lesson.ipynb")) == {"seed": value}


def test_a_grid_is_every_combination_or_a_list(tmp_path: Path) -> None:
    path = tmp_path / "grid.yml"
    path.write_text("bits: [w4a4, w3a3]\nbudget: quick\nseed: [0, 1]\n")
    every = [(run["bits"], run["budget"], run["seed"]) for run in read_grid(path)]
    assert every == [(bits, "quick", seed) for bits in ("w4a4", "w3a3") for seed in (0, 1)]
    path.write_text("- {bits: w4a4}\n- {bits: w2a2, seed: 3}\n")
    assert read_grid(path) == [{"bits": "w4a4"}, {"bits": "w2a2", "seed": 3}]


def test_results_become_one_level() -> None:
    nested = {"a": {"b": [1, {"c": 2}]}, "d": "text", "empty": {}}
    assert flatten(nested) == {"a.b.0": 1, "a.b.1.c": 2, "d": "text"}


def test_only_dictionaries_that_were_displayed_count_as_results() -> None:
    shown = [{"application/json": {"a": 1}}, {"application/json": [2]}, {"text/plain": "a"}]
    output = [nbformat.v4.new_output("display_data", data) for data in shown]
    assert displayed_json(new_notebook(cells=[new_code_cell("", outputs=output)])) == {"a": 1}


def test_a_folder_with_braces_in_its_name_is_a_folder(rerun: Callable[..., Any], tmp_path: Path) -> None:
    lesson = write_notebook(tmp_path / "lesson.ipynb", "print(rate)")
    for name in ("run_{rate}", "out{x}"):
        code, out, err = rerun(lesson, "-p", "rate", "1", "-p", "checkpoint", "a=b#{c}", "--output", tmp_path / name)
        assert (code, err) == (0, ""), out
        assert sorted(each.name for each in (tmp_path / name).iterdir()) == [
            "lesson.html", "lesson.ipynb", "lesson.json",
        ]  # fmt: skip


def test_a_place_that_is_taken_is_named_before_anything_runs(rerun: Callable[..., Any], tmp_path: Path) -> None:
    lesson = write_notebook(tmp_path / "lesson.ipynb", f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "out" / "lesson.json").mkdir(parents=True)
    code, _, err = rerun(lesson, "--output", tmp_path / "out")
    assert code == 2
    assert "lesson.json is a folder" in err
    (tmp_path / "table" / "results.csv").mkdir(parents=True)
    (tmp_path / "grid.yml").write_text("seed: [1, 2]\n")
    code, _, err = rerun(lesson, "--grid", tmp_path / "grid.yml", "--output", tmp_path / "table")
    assert code == 2
    assert "results.csv is a folder" in err
    assert not (tmp_path / "ran").exists()
