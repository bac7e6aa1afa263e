"""What every lesson promises, whatever it teaches: it can be rerun, compared, read and kept in a repository."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from _notebooks import code_digest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("[0-9][0-9]_*.ipynb"))
EVERY = [pytest.param(path, id=str(path.relative_to(FOLDER))) for path in LESSONS + SOLUTIONS]
TAUGHT = [pytest.param(path, id=path.name) for path in LESSONS]

MAX_BYTES = 400 * 1024
MAX_LINES = 34
IGNORE = "nbval-ignore-output"
KNOWN_TAGS = {"parameters", IGNORE, "raises-exception"}
SECTIONS = ("You will", "Predict first", "Play", "When it breaks", "Exercises", "Takeaways", "Common confusions")
EQUATION = re.compile(r"\b(DFQF|GDFQ|DSG|AKD|ZeroQ|DAFL|DFAD|LSQ),? Eqs?\. ?(\d+)(?:\s?[-–]\s?(\d+))?")


@functools.cache
def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path: Path) -> str:
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def parameters_cell(path: Path) -> Any:
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    return cell


def equations(text: str) -> set[tuple[str, int]]:
    """Pairs of paper and equation number, ranges spelled out; "DFQF Eq. 10-11" names two."""
    found = set()
    for paper, first, last in EQUATION.findall(text):
        found |= {(paper, number) for number in range(int(first), int(last or first) + 1)}
    return found


def library_objects(path: Path) -> list[Any]:
    """Functions and classes of dfqlib that a lesson's code names, by attribute (``losses.kd``) or by import."""
    names: dict[str, Any] = {}
    trees = [ast.parse(cell.source) for cell in code_cells(path)]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "dfqlib"]
            names |= {name.split(".")[0]: importlib.import_module(name.split(".")[0]) for name in modules}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dfqlib":
            for alias in node.names:
                names[alias.asname or alias.name] = _member(str(node.module), alias.name)
    used = []
    for node in (node for tree in trees for node in ast.walk(tree)):
        chain = _chain(node)
        if chain and chain[0] in names:
            target = names[chain[0]]
            for attribute in chain[1:]:
                target = getattr(target, attribute, None)
            used.append(target)
    return [target for target in used if target is not None and not isinstance(target, ModuleType)]


def _member(module: str, name: str) -> Any:
    parent = importlib.import_module(module)
    return getattr(parent, name) if hasattr(parent, name) else importlib.import_module(f"{module}.{name}")


def _chain(node: ast.AST) -> list[str]:
    """``a.b.c`` as its names; empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = _chain(node.value)
        return [*before, node.attr] if before else []
    return []


def test_there_are_lessons_and_each_has_solutions():
    assert LESSONS
    assert {path.name for path in SOLUTIONS} == {path.name for path in LESSONS}


@pytest.mark.parametrize("path", EVERY)
def test_is_valid_small_and_free_of_leftovers(path):
    nbformat.validate(read(path))
    assert path.stat().st_size <= MAX_BYTES
    assert "widgets" not in read(path).metadata
    assert "papermill" not in read(path).metadata
    for cell in read(path).cells:
        assert "papermill" not in cell.metadata
        assert set(cell.metadata.get("tags", [])) <= KNOWN_TAGS, cell.id
    # A view points to a widget by a random identifier of a kernel long gone; a path names somebody's machine.
    text = path.read_text(encoding="utf-8")
    for leftover in ("widget-view+json", "widget-state+json", "image/svg", str(ROOT), str(Path.home()) + "/"):
        assert leftover not in text


@pytest.mark.parametrize("path", EVERY)
def test_was_run_from_top_to_bottom_without_an_error(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not any(output.output_type == "error" for output in cell.outputs), cell.id
        streams = [output.name for output in cell.outputs if output.output_type == "stream"]
        assert "stderr" not in streams, f"{cell.id} warns"


@pytest.mark.parametrize("path", EVERY)
def test_makes_its_claims_at_its_own_parameters(path):
    # A lesson that takes its defaults for somebody else's parameters asserts nothing.
    texts = [output.get("text", "") for cell in code_cells(path) for output in cell.outputs]
    assert not [text for text in texts if "not the default parameters" in text]


@pytest.mark.parametrize("path", EVERY)
def test_outputs_are_those_of_this_code(path):
    """What nbval cannot see: cells it does not compare, and pictures, of a notebook edited after its last run."""
    ran = read(path).metadata.get("dfqlib", {}).get("code")
    assert ran == code_digest(read(path)), f"its code was not run as it is: make refresh ARGS={path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", EVERY)
def test_code_is_short_and_free_of_notebook_tricks(path):
    for source in (cell.source for cell in code_cells(path)):
        ast.parse(source)  # no %magic, no !shell: the code is Python
        assert not source.rstrip().endswith(";")
        assert len(source.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", EVERY)
def test_at_most_a_third_of_the_outputs_go_uncompared(path):
    cells = code_cells(path)
    ignored = [cell for cell in cells if IGNORE in cell.metadata.get("tags", [])]
    assert 3 * len(ignored) <= len(cells)


@pytest.mark.parametrize("path", EVERY)
def test_parameters_are_typed_commented_literals(path):
    source = parameters_cell(path).source
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.AnnAssign), ast.unparse(statement)
        value = ast.literal_eval(statement.value)
        assert type(value).__name__ == ast.unparse(statement.annotation)
        assert "  # " in source.splitlines()[statement.lineno - 1], "what is it for?"
    assert "seed" in {ast.unparse(statement.target) for statement in ast.parse(source).body}


@pytest.mark.parametrize("path", EVERY)
def test_papermill_lists_the_parameters_as_they_are_written(path):
    from papermill.inspection import inspect_notebook

    written = {ast.unparse(s.target): ast.unparse(s.annotation) for s in ast.parse(parameters_cell(path).source).body}
    listed = inspect_notebook(str(path))
    assert {name: entry["inferred_type_name"] for name, entry in listed.items()} == written
    assert all(entry["help"] for entry in listed.values())


PAPERS = {
    "DFQF": {
        1: "label", 2: "student", 5: "inception|balance|Confident|uncertain", 6: "KL|Gaussian", 7: "diverg|statistic",
        8: "advers", 9: "generator", 10: "step|quantize", 11: "clamp",
    },
    "GDFQ": {
        3: "generator", 4: "label|class", 5: "statistic|BNS|matched", 6: "affine|bound|zero point|bits", 7: "label",
        8: "distill|KD|soft",
        9: r"generator|G\b|BNS", 10: "student|Q",
    },
    "LSQ": {3: "step"},
}  # fmt: skip
"""What the equations are about, copied from the papers: a word beside each citation must say so."""


@pytest.mark.parametrize("path", sorted((ROOT / "dfqlib").rglob("*.py")), ids=lambda path: path.stem)
def test_an_equation_is_cited_for_what_it_says(path):
    for text in re.split(r"\n\s*\n", path.read_text()):
        for paper, number in equations(text):
            if paper in PAPERS:
                assert number in PAPERS[paper], f"{paper} has no Eq. {number}"
                assert re.search(PAPERS[paper][number], text, re.IGNORECASE), f"{paper} Eq. {number}: {text}"


@pytest.mark.parametrize("path", TAUGHT)
def test_every_cited_equation_is_that_of_a_function_the_lesson_uses(path):
    documented = set()
    for target in library_objects(path):
        documented |= equations(inspect.getdoc(target) or "")
    assert equations(prose(path)) <= documented


@pytest.mark.parametrize("path", TAUGHT)
def test_follows_the_template(path):
    text, number = prose(path), path.name[:2]
    assert text.startswith(f"# {number} · ")
    for section in SECTIONS:
        assert re.search(rf"^## {section}", text, re.MULTILINE), f"no section {section!r}"
    assert "<details>" in text
    assert "References" in text
    assert "Next" in text
    assert f"solutions/{path.name}" in text


@pytest.mark.parametrize("path", TAUGHT)
def test_claims_are_asserted(path):
    trees = [ast.parse(cell.source) for cell in code_cells(path)]
    assert any(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))


@pytest.mark.parametrize("path", EVERY)
def test_exercises_are_open_in_the_lesson_and_right_in_its_solutions(path):
    printed = "".join(output.get("text", "") for cell in code_cells(path) for output in cell.outputs)
    expected = "right" if path.parent.name == "solutions" else "no answer yet"
    assert re.findall(r"^exercise (\d): (.*)$", printed, re.MULTILINE) == [(number, expected) for number in "123"]


@pytest.mark.parametrize("path", TAUGHT)
def test_leaves_its_results_for_a_sweep(path):
    displayed = [
        output.data["application/json"]
        for cell in code_cells(path)
        for output in cell.outputs
        if "application/json" in output.get("data", {})
    ]
    assert displayed
    json.dumps(displayed, allow_nan=False)


@pytest.mark.parametrize("path", EVERY)
def test_links_to_files_lead_somewhere(path):
    links = re.findall(
        r"\]\(([^)#\s]+)", "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    )
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing
