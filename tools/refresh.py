"""Run the notebooks again in place and keep the new outputs: `make refresh`.

    python tools/refresh.py [NOTEBOOK or FOLDER ...]
    python tools/refresh.py --check     change nothing; name the cells whose outputs are not those of the code

One thread, a fresh kernel each, default parameters; nothing that differs between two runs of the same code is
kept (timings of cells, identifiers of widgets). A notebook that fails is left as it was. Exit code: 0; 1 when a
notebook failed or, with --check, is stale; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from _compare import stale_cells
from _notebooks import CELL_TIMEOUT, code_digest, find_notebooks
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from dfqlib.training.files import written_whole

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> Any:
    """The notebook with the outputs of a run in the folder it lies in."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=CRITICAL"],
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    tidy(notebook)
    nbformat.validate(notebook)
    return notebook


def tidy(notebook: Any) -> None:
    """Keep of the metadata what a reader or a tool needs, and nothing that changes from run to run."""
    notebook.metadata = nbformat.from_dict(
        {
            "dfqlib": {"code": code_digest(notebook)},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in ("tags",) if key in cell.metadata})
        for output in cell.get("outputs", []):
            # A view refers to a widget by a random identifier that only its own kernel knows.
            output.get("data", {}).pop(WIDGET_VIEW, None)


def treat(name: str, path: Path, options: argparse.Namespace) -> bool:
    """Refresh or check one notebook and say so; returns whether all is well."""
    start, cells = time.perf_counter(), list[str]()
    try:
        notebook = execute(path)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"FAILED {name}{'' if options.check else ', left as it was'}\n{error}", flush=True)
        return False
    if options.check:
        cells = list(stale_cells(nbformat.read(path, as_version=4), notebook, exact=options.exact))
    else:
        with written_whole(path) as temporary:
            nbformat.write(notebook, temporary)
    title = f"{'STALE ' if cells else ''}{name} {time.perf_counter() - start:.1f} s"
    print("\n".join([title, *(f"  {cell}" for cell in cells)]), flush=True)
    return not cells


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
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")  # this environment's kernel, no other
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        try:
            fine = list(pool.map(treat, notebooks, notebooks.values(), itertools.repeat(options)))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(130)  # the kernels end with this process
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
