"""Run the notebooks headless and write build/tutorial/index.html.

    python tools/tutorial.py                                       every notebook of notebooks/
    python tools/tutorial.py notebooks/07_*.ipynb -p bits w2a2     one, with a parameter of its own

Each notebook leaves an executed copy, an HTML page and a JSON file: parameters, seconds, versions, and what
the notebook displayed as ``IPython.display.JSON``, so that a sweep is a table. Exit code: 0; 1 when a
notebook failed; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
from _notebooks import CELL_TIMEOUT, KERNEL, QUIET_KERNEL, ROOT, find_notebooks, fix_environment
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

RECORDED_VERSIONS = ("dfqlib", "numpy", "scikit-learn", "torch", "torchvision")
LAST_LINES = 30  # of a traceback


@dataclass(frozen=True)
class Run:
    """One executed notebook; ``error`` shows the failing cell, None when there is none."""

    name: str
    title: str
    seconds: float
    error: str | None


def run_notebook(name: str, source: Path, output: Path, parameters: dict[str, Any]) -> Run:
    """Execute one notebook in the folder it lies in and write its copy, page and results below ``output``."""
    target = output / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    start, error = time.perf_counter(), None
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters,
            kernel_name=KERNEL,
            language="python",
            cwd=source.parent,
            progress_bar=False,
            execution_timeout=CELL_TIMEOUT,
            extra_arguments=QUIET_KERNEL,
        )
    except PapermillExecutionError as failure:
        error = describe(failure.exec_count, failure.source, str(failure))
    except Exception as failure:  # a dead kernel, a cell past its time, a file that is no notebook
        error = describe(*last_cell(target), f"{type(failure).__name__}: {failure}")
    seconds = time.perf_counter() - start

    notebook = nbformat.read(target if target.exists() else source, as_version=4)
    write_page(notebook, target.with_suffix(".html"))
    results = {
        "notebook": name,
        "parameters": default_parameters(source) | parameters,
        "seconds": round(seconds, 1),
        "error": error,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in RECORDED_VERSIONS},
        },
        "results": displayed_json(notebook),
    }
    target.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return Run(name, find_title(notebook) or name, seconds, error)


def describe(count: int | None, source: str, message: str) -> str:
    """Show a failing cell: its number, its source, and the end of what went wrong."""
    lines = [f"in cell [{count or '?'}]:", *(f"    {line}" for line in source.splitlines())]
    return "\n".join(lines + message.strip().splitlines()[-LAST_LINES:])


def last_cell(executed: Path) -> tuple[int | None, str]:
    """Find the cell that was being executed when papermill gave up."""
    if not executed.exists():
        return None, ""
    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    started = [cell for cell in cells if cell.metadata.get("papermill", {}).get("start_time")]
    return (len(started), started[-1].source) if started else (None, "")


def default_parameters(source: Path) -> dict[str, Any]:
    """Read the literals that a notebook's parameters cell assigns."""
    cells = nbformat.read(source, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    defaults: dict[str, Any] = {}
    for statement in ast.parse("\n".join(tagged)).body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            defaults |= {ast.unparse(target): literal(ast.unparse(statement.value)) for target in targets}
    return defaults


def literal(text: str) -> Any:
    """Read ``text`` as a Python literal; what is none is a string."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def displayed_json(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Merge everything that the notebook displayed as JSON."""
    merged: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            merged |= output.get("data", {}).get("application/json", {})
    return merged


def find_title(notebook: nbformat.NotebookNode) -> str | None:
    """Find the first heading."""
    headings = (re.search(r"^# (.+)$", cell.source, re.M) for cell in notebook.cells if cell.cell_type == "markdown")
    return next((heading[1].strip() for heading in headings if heading), None)


def write_page(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook as HTML, with its links to other notebooks leading to their pages."""
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    path.write_text(re.sub(r'(href="[^":]+)\.ipynb', r"\1.html", page), encoding="utf-8")


def write_index(runs: list[Run], path: Path) -> None:
    """Write the table of contents."""
    rows = "\n".join(
        f'<tr><td><a href="{html.escape(run.name)}.html">{html.escape(run.title)}</a></td>'
        f"<td>{run.seconds:.1f} s</td><td>{'failed' if run.error else 'ok'}</td></tr>"
        for run in runs
    )
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Data-free quantization, lesson by lesson</title>
<style>
body {{ font: 1rem/1.5 system-ui; margin: 3rem auto; max-width: 48rem; }}
td {{ padding-right: 2rem; }}
</style>
<h1>Data-free quantization, lesson by lesson</h1>
<table>
{rows}
</table>
</html>
""",
        encoding="utf-8",
    )


def run_all(notebooks: dict[str, Path], output: Path, parameters: dict[str, Any], jobs: int) -> Iterator[Run]:
    """Execute the notebooks, ``jobs`` at a time, and yield each as it ends."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        names = {pool.submit(run_notebook, name, file, output, parameters): name for name, file in notebooks.items()}
        try:
            for done in as_completed(names):
                try:
                    yield done.result()
                except BrokenProcessPool:
                    yield Run(names[done], names[done], 0.0, "its process was killed; is there enough memory?")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong one ends here, before anything is run."""
    parser = argparse.ArgumentParser(description="Run the notebooks headless and write an HTML index.")
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders (default: notebooks/)")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "tutorial")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("-j", "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many at a time")
    options = parser.parse_intermixed_args(arguments)
    options.parameters = {name: literal(value) for name, value in options.parameter}
    try:
        options.notebooks = find_notebooks(options.paths)
    except FileNotFoundError as error:
        parser.error(str(error))
    # papermill takes a name that no notebook has without a word.
    for name, file in options.notebooks.items() if options.parameters else ():
        known = default_parameters(file)
        if unknown := options.parameters.keys() - known.keys():
            parser.error(f"{name} has no parameter {sorted(unknown)[0]!r}; it has {', '.join(known) or 'none'}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output} cannot be a folder ({error.strerror}); name another")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; return the exit code."""
    options = parse(arguments)
    fix_environment()
    output = options.output.resolve()
    width = max(map(len, options.notebooks))
    runs: dict[str, Run] = {}
    try:
        for run in run_all(options.notebooks, output, options.parameters, options.jobs):
            runs[run.name] = run
            print(f"{'FAILED' if run.error else 'ok':6} {run.name:{width}} {run.seconds:6.1f} s", flush=True)
            if run.error:
                print(run.error, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    write_index([runs[name] for name in options.notebooks], output / "index.html")
    failed = sum(run.error is not None for run in runs.values())
    shown = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    print(f"{len(runs) - failed} of {len(runs)} notebooks ran. Read {shown / 'index.html'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
