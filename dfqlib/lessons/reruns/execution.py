"""Execute one notebook, and leave of it a copy, a page and its results: each whole, as far as the notebook came."""

import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dfqlib.errors import InputError
from dfqlib.lessons.reruns.parameters import read_notebook, read_parameters
from dfqlib.training.files import check_writable, written_whole

__all__ = [
    "KERNEL", "QUIET_KERNEL", "Job", "Run", "check_output", "code_cells", "execute", "fix_environment", "write_results",
]  # fmt: skip

KERNEL = "python3"
QUIET_KERNEL = ["--log-level=CRITICAL"]  # without its own remarks between our lines
RECORDED_VERSIONS = ("dfqlib", "numpy", "scikit-learn", "torch", "torchvision")
SUFFIXES = (".ipynb", ".html", ".json")
"""The files that a job leaves."""
LAST_LINES = 30  # of a traceback


@dataclass(frozen=True)
class Job:
    """A notebook to run.

    Attributes:
        name: what it is called in messages and in its results.
        source: the notebook; it runs in the folder it lies in and is only read.
        target: where the results go, without suffix: .ipynb, .html and .json are added.
        parameters: values that replace the notebook's own, as ``values_for`` checks them.
        cell_timeout: seconds for one cell; None for no limit.
    """

    name: str
    source: Path
    target: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    cell_timeout: int | None = None


@dataclass(frozen=True)
class Run:
    """A job that was run.

    Attributes:
        job: the job.
        record: what its .json holds: notebook, parameters, seconds, peak_gb, error, versions, results.
    """

    job: Job
    record: dict[str, Any]

    @property
    def error(self) -> str | None:
        """The failing cell and the end of its traceback; None when all cells ran."""
        error: str | None = self.record["error"]
        return error


def check_output(job: Job) -> None:
    """Make the folder of the job's results, which must not lie in the notebook's own place.

    Raises:
        InputError: the folder cannot be made, a file in it cannot be written, or the notebook would be replaced by its
            copy.
    """
    folder = job.target.parent
    if _beside(job.target, ".ipynb").resolve() == job.source.resolve():
        raise InputError(f"--output={folder} holds {job.source.name} itself, which would be replaced; name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={folder} cannot be a folder ({error.strerror}); name another") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output={folder} cannot be written to; name another")
    for suffix in SUFFIXES:
        check_writable(_beside(job.target, suffix), "--output")


def fix_environment() -> None:
    """Make kernels start from this interpreter's environment, with one thread.

    Outputs must not depend on the number of cores, and a ``python3`` kernel that is registered elsewhere on
    the machine must not be taken for ours.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")


def execute(job: Job, on_cell: Callable[[], None]) -> str | None:
    """Execute the notebook into a partial file; ``write_results`` puts it in its place.

    Args:
        job: what to run.
        on_cell: called after each code cell.

    Returns:
        The failing cell and the end of what went wrong; None when all cells ran.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    _partial(job).unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            _literally(job.source),
            _literally(_partial(job)),
            job.parameters,
            kernel_name=KERNEL,
            language="python",
            cwd=job.source.parent,
            progress_bar=False,
            execution_timeout=job.cell_timeout,
            extra_arguments=QUIET_KERNEL,
            on_cell_complete=lambda **_: on_cell(),
        )
    except PapermillExecutionError as failure:
        return _describe(failure.exec_count, failure.source, str(failure))
    except Exception as failure:  # a dead kernel, a cell past its time, a disk that is full
        return _describe(*_last_cell(_partial(job)), f"{type(failure).__name__}: {failure}")
    return None


def write_results(job: Job, seconds: float, peak_gb: float | None, error: str | None) -> dict[str, Any]:
    """Put the job's three files in their place, the notebook as far as it came.

    Args:
        job: was executed, or was to be.
        seconds: that it took.
        peak_gb: the most memory that its kernel held; None when not known.
        error: as ``execute`` returns it.

    Returns:
        What the .json holds, see ``Run.record``.
    """
    source, partial = read_notebook(job.source), _partial(job)
    try:
        notebook = read_notebook(partial)
        partial.replace(_beside(job.target, ".ipynb"))
    except InputError:  # it was stopped before its first cell, or while it was being saved
        notebook = source
        partial.unlink(missing_ok=True)
        error = error or "it left no notebook"
    defaults = {name: parameter.default for name, parameter in read_parameters(source).items()}
    record = {
        "notebook": job.name,
        "parameters": defaults | job.parameters,
        "seconds": round(seconds, 1),
        "peak_gb": peak_gb,
        "error": error,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in RECORDED_VERSIONS},
        "results": displayed_json(notebook),
    }
    _write_page(notebook, _beside(job.target, ".html"))
    with written_whole(_beside(job.target, ".json")) as temporary:
        temporary.write_text(json.dumps(_finite(record), indent=2, default=str) + "\n", encoding="utf-8")
    return record


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN: these become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _write_page(notebook: Any, path: Path) -> None:
    """Write a notebook as HTML, with its links to other notebooks leading to their pages."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    with written_whole(path) as temporary:
        temporary.write_text(re.sub(r'(href="[^":]+)\.ipynb', r"\1.html", page), encoding="utf-8")


def displayed_json(notebook: Any) -> dict[str, Any]:
    """Merge every dictionary that the notebook displayed as JSON."""
    merged: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shown = output.get("data", {}).get("application/json")
            merged |= shown if isinstance(shown, dict) else {}
    return merged


def _describe(count: int | None, source: str, message: str) -> str:
    """Show a failing cell: its number, its source, and the end of what went wrong."""
    lines = [f"in cell [{count or '?'}]:", *(f"    {line}" for line in source.splitlines())]
    return "\n".join(lines + message.strip().splitlines()[-LAST_LINES:])


def _last_cell(executed: Path) -> tuple[int | None, str]:
    """Find the cell that was being executed when papermill gave up."""
    if not executed.exists():
        return None, ""
    started = [
        cell for cell in code_cells(read_notebook(executed)) if cell.metadata.get("papermill", {}).get("start_time")
    ]
    return (len(started), started[-1].source) if started else (None, "")


def code_cells(notebook: Any) -> list[Any]:
    """The cells that are executed."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _literally(path: Path) -> str:
    """papermill fills names in braces with parameters, in paths too."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _partial(job: Job) -> Path:
    return job.target.with_name(f".{job.target.name}.partial.ipynb")


def _beside(target: Path, suffix: str) -> Path:
    """``target`` with the suffix added; a name with a dot in it keeps what follows the dot."""
    return target.with_name(target.name + suffix)
