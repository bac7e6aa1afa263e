"""Run the notebooks again in place and keep the new outputs: `make refresh`.

    python tools/refresh.py [NOTEBOOK or FOLDER ...]
    python tools/refresh.py --check     change nothing; name the cells whose outputs are not those of the code

One thread, a fresh kernel each, default parameters; nothing that differs between two runs of the same code is
kept (timings of cells, identifiers of widgets). A notebook that fails is left as it was. Exit code: 0; 1 when a
notebook failed or, with --check, is stale; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from _compare import stale_cells
from _notebooks import CELL_TIMEOUT, code_digest, find_notebooks
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from dfqlib.lessons.reruns.execution import KERNEL, QUIET_KERNEL
from dfqlib.lessons.reruns.processes import run_apart
from dfqlib.training.files import written_whole

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> Any:
    """The notebook with the outputs of a run in the folder it lies in."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        kernel_name=KERNEL,
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=QUIET_KERNEL,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute()
    tidy(notebook)
    nbformat.validate(notebook)
    return notebook


def tidy(notebook: Any) -> None:
    """Keep of the metadata what a reader or a tool needs, and nothing that changes from run to run."""
    notebook.metadata = nbformat.from_dict(
        {
            "dfqlib": {"code": code_digest(notebook)},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": KERNEL},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in ("tags",) if key in cell.metadata})
        for output in cell.get("outputs", []):
            # A view refers to a widget by a random identifier that only its own kernel knows.
            output.get("data", {}).pop(WIDGET_VIEW, None)


def main(arguments: list[str] | None = None) -> int:
    """Refresh or check what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description="Run notebooks in place and keep the new outputs.")
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders (default: notebooks/)")
    parser.add_argument("--check", action="store_true", help="change nothing; name the stale notebooks and cells")
    parser.add_argument(
        "--exact", action="store_true", help="with --check: every byte, on the machine that made the outputs"
    )
    parser.add_argument("-j", "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many at a time")
    options = parser.parse_intermixed_args(arguments)
    if options.exact and not options.check:
        parser.error("--exact needs --check")
    try:
        notebooks = find_notebooks(options.paths)
    except FileNotFoundError as error:
        parser.error(str(error))
    tasks = [Task(name, path, options.check, options.exact) for name, path in notebooks.items()]
    fine = True
    try:
        for _, (succeeded, report) in run_apart(treat, tasks, max(1, options.jobs), killed):
            fine = fine and succeeded
            print(report, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return int(not fine)


@dataclass(frozen=True)
class Task:
    """A notebook to refresh or to check."""

    name: str
    path: Path
    check: bool
    exact: bool


def treat(task: Task, _: Callable[[], None]) -> tuple[bool, str]:
    """Refresh or check one notebook; returns whether all is well, and what to say about it."""
    start, cells = time.perf_counter(), list[str]()
    try:
        notebook = execute(task.path)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return False, f"FAILED {task.name}{'' if task.check else ', left as it was'}\n{error}"
    if task.check:
        cells = list(stale_cells(nbformat.read(task.path, as_version=4), notebook, exact=task.exact))
    else:
        with written_whole(task.path) as temporary:
            nbformat.write(notebook, temporary)
    title = f"{'STALE ' if cells else ''}{task.name} {time.perf_counter() - start:.1f} s"
    return not cells, "\n".join([title, *(f"  {cell}" for cell in cells)])


def killed(task: Task, seconds: float) -> tuple[bool, str]:
    """What to say of a notebook whose process ended by itself."""
    return False, f"FAILED {task.name}, left as it was: its process was killed after {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
