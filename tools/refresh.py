"""Run the notebooks again in place and keep the new outputs: `make refresh`.

    python tools/refresh.py [NOTEBOOK or FOLDER ...]

One thread, a fresh kernel each, default parameters; nothing that differs between two runs of the same code is
kept (timings of cells, identifiers of widgets). A notebook that fails is left as it was. Exit code: 0, or 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from _notebooks import CELL_TIMEOUT, KERNEL, QUIET_KERNEL, find_notebooks, fix_environment
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def refresh(path: Path) -> None:
    """Execute one notebook in the folder it lies in and write it back, whole or not at all."""
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
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Keep of the metadata what a reader or a tool needs, and nothing that changes from run to run."""
    notebook.metadata = nbformat.from_dict(
        {
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
    """Refresh what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description="Run notebooks in place and keep the new outputs.")
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders (default: notebooks/)")
    options = parser.parse_args(arguments)
    try:
        notebooks = find_notebooks(options.paths)
    except FileNotFoundError as error:
        parser.error(str(error))
    fix_environment()
    failed = False
    for name, path in notebooks.items():
        start = time.perf_counter()
        try:
            refresh(path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed = True
            print(f"FAILED {name}, left as it was\n{error}", flush=True)
        else:
            print(f"{name} {time.perf_counter() - start:.1f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
