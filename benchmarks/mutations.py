"""Do the lessons notice a wrong loss? Each loss is spoiled in a copy of the package and its lessons are run on it.

    python benchmarks/mutations.py                        # every loss, some minutes each
    python benchmarks/mutations.py zeroq_loss dafl_loss   # these
    python benchmarks/mutations.py --missing              # what no run has looked at yet

A mutation turns the sign of a whole loss, or of one term of an objective. The lessons that use it are run, the one that
its docstring names first, then their solutions, until a cell fails or, in one that runs through, an output differs that
nbval compares. Writes results/mutations.json after each. Exit code: 0; 1 when a mutation survived.
"""

import argparse
import ast
import functools
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
RESULTS = ROOT / "results" / "mutations.json"
CELL_TIMEOUT = 600
WITHOUT_SUFFIX = ("batch_entropy", "layerwise_enhancement", "sample_entropy")  # losses that are not called so

# The wrapper leaves inspect.getsource as it was, so that what a lesson shows is not what gives the mutation away.
NEGATIVE = """

def _negative(loss):
    import functools

    @functools.wraps(loss)
    def negative(*arguments, **options):
        return -loss(*arguments, **options)

    return negative


{name} = _negative({name})
"""


@dataclass(frozen=True)
class Mutation:
    """One change of one module: ``source`` takes the place of the file ``module`` (relative to the package)."""

    function: str
    change: str
    module: Path
    source: str

    @property
    def name(self) -> str:
        return f"{self.function}: {self.change}"


def mutations(functions: list[str]) -> Iterator[Mutation]:
    """The signs to turn: of each loss as a whole, and of each sum's term where it is an objective."""
    from dfqlib import losses

    for name in functions:
        function = getattr(losses, name)
        module = Path(inspect.getfile(function))
        source, where = module.read_text(encoding="utf-8"), module.relative_to(ROOT / "dfqlib")
        yield Mutation(name, "sign of the whole", where, source + NEGATIVE.format(name=name))
        if where.name == "objectives.py":
            yield from (Mutation(name, change, where, text) for change, text in turned_terms(source, name))


def turned_terms(source: str, function: str) -> Iterator[tuple[str, str]]:
    """The module with one ``+`` or ``-`` of the function's returned sum turned into the other."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    (tree,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function]
    returned = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    for node in (node for statement in returned for node in ast.walk(statement)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            left, right = node.left, node.right
            begin = starts[left.end_lineno - 1] + left.end_col_offset  # type: ignore[operator]
            end = starts[right.lineno - 1] + right.col_offset
            swapped = source[begin:end].translate(str.maketrans("+-", "-+"))
            yield f"sign of {ast.unparse(right)}", source[:begin] + swapped + source[end:]


def lessons_for(function: str) -> list[Path]:
    """The lesson that the docstring names, then the others whose code names the function."""
    from dfqlib import losses

    named = re.findall(r"notebook (\d\d)", inspect.getdoc(getattr(losses, function)) or "")
    every = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    using = [path for path in every if re.search(rf"\b{function}\b", code(path))]
    lessons = sorted(using, key=lambda path: path.name[:2] not in named) or [p for p in every if p.name[:2] in named]
    return lessons + [path.parent / "solutions" / path.name for path in lessons]


@functools.cache
def code(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def try_out(mutation: Mutation) -> dict[str, Any]:
    """Run the lessons on a spoiled copy of the package until a cell fails."""
    start, survived, caught = time.perf_counter(), [], None
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "dfqlib"
        shutil.copytree(ROOT / "dfqlib", package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / mutation.module).write_text(mutation.source, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        check_used(package, environment)
        for lesson in lessons_for(mutation.function):
            caught = failing_cell(lesson, environment)
            if caught is not None:
                break
            survived.append(lesson.stem)
    seconds = round(time.perf_counter() - start, 1)
    return {"caught": caught, "not noticed by": survived, "seconds": seconds}


def check_used(package: Path, environment: dict[str, str]) -> None:
    """Make sure that a kernel imports the copy."""
    command = [sys.executable, "-c", "import dfqlib; print(dfqlib.__file__)"]
    found = subprocess.run(
        command, cwd=ROOT / "notebooks", env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(found).resolve() == (package / "__init__.py").resolve(), found


def failing_cell(lesson: Path, environment: dict[str, str]) -> dict[str, Any] | None:
    """The first cell that fails, or whose compared output differs; None when all is as it was."""
    from _compare import stale_cells
    from _notebooks import code_cells
    from refresh import tidy

    kept, notebook = (nbformat.read(lesson, as_version=4) for _ in range(2))
    where = str(lesson.relative_to(ROOT / "notebooks").with_suffix(""))
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(lesson.parent)}},
        extra_arguments=["--log-level=CRITICAL"],
        store_widget_state=False,
        coalesce_streams=True,
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        failed = [any(output.output_type == "error" for output in cell.outputs) for cell in code_cells(notebook)]
        plain = re.sub(r"\x1b\[[0-9;]*m", "", error.traceback)
        statement = re.search(r"^-+> \d+ +(.+)$", plain, re.MULTILINE)
        found = {"statement": statement[1] if statement else "", "error": f"{error.ename}: {error.evalue}".rstrip(": ")}
        return {"lesson": where, "cell": failed.index(True) + 1, **found}
    tidy(notebook)
    for report in stale_cells(kept, notebook, exact=False):
        number = int(report.partition("]")[0].removeprefix("cell ["))
        return {"lesson": where, "cell": number, "output": report.partition(": ")[2]}
    return None


def write(results: dict[str, Any]) -> None:
    """Write all results, those of earlier runs included."""
    content = {
        "command": "python benchmarks/mutations.py",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "mutations": dict(sorted(results.items())),
    }
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    from dfqlib import losses

    named_so = (name for name in losses.__all__ if name.endswith("_loss") or name in WITHOUT_SUFFIX)
    every = [name for name in named_so if lessons_for(name)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functions", nargs="*", metavar="LOSS", help="names in dfqlib.losses (default: all taught)")
    parser.add_argument("--missing", action="store_true", help="leave out what the results have already caught")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.functions) - set(every):
        parser.error(f"{sorted(unknown)[0]} is no loss that a lesson uses; they are {', '.join(every)}")
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    results: dict[str, Any] = json.loads(RESULTS.read_text())["mutations"] if RESULTS.exists() else {}
    todo = list(mutations(options.functions or every))
    if options.missing:
        todo = [mutation for mutation in todo if not results.get(mutation.name, {}).get("caught")]
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(try_out, mutation): mutation for mutation in todo}
        for done in as_completed(running):
            found, name = done.result(), running[done].name
            caught = found["caught"]
            print(name, "->", f"{caught['lesson']} cell [{caught['cell']}]" if caught else "SURVIVED", flush=True)
            results[name] = found
            write(results)
    return int(any(results[mutation.name]["caught"] is None for mutation in todo))


if __name__ == "__main__":
    sys.exit(main())
