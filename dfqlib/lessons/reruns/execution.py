"""Run notebooks in papermill's kernels, and leave of each a copy, a page and its results, as far as it came."""

import json
import logging
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dfqlib
from dfqlib.errors import InputError
from dfqlib.lessons.reruns.parameters import import_extra, read_notebook, read_parameters
from dfqlib.training.files import check_writable, written_whole
from dfqlib.training.machine import peak_gb

__all__ = ["SUFFIXES", "Job", "Run", "check_output", "displayed_json", "run_jobs"]

SUFFIXES = (".ipynb", ".html", ".json")
LAST_LINES = 30  # of a traceback


@dataclass(frozen=True)
class Job:
    """A notebook to run in the folder it lies in, with parameters that ``values_for`` has checked.

    The results go to ``target`` with .ipynb, .html and .json added; a cell may take ``cell_timeout`` seconds.
    """

    name: str
    source: Path
    target: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    cell_timeout: int | None = None

    def file(self, suffix: str) -> Path:
        """One of the files that the job leaves."""
        return self.target.with_name(self.target.name + suffix)


@dataclass(frozen=True)
class Run:
    """A job that was run, and what its .json holds: parameters, seconds, peak_gb, error, versions, results."""

    job: Job
    record: dict[str, Any]

    @property
    def error(self) -> str | None:
        """The failing cell and the end of its traceback; None when all cells ran."""
        return self.record["error"]


def check_output(job: Job) -> None:
    """Make the folder of the job's results; InputError where a file in it cannot be written or is the notebook."""
    folder = job.target.parent
    if job.file(".ipynb").resolve() == job.source.resolve():
        raise InputError(f"--output={folder} holds {job.source.name} itself, which would be replaced; name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={folder} cannot be a folder ({error.strerror}); name another") from None
    for suffix in SUFFIXES:
        check_writable(job.file(suffix), "--output")


def run_jobs(jobs: Sequence[Job], at_a_time: int = 1, *, progress: bool | None = False) -> Iterator[Run]:
    """Run the jobs, and yield each as it ends; after Ctrl-C each that runs is written as far as it came.

    Args:
        jobs: whose outputs ``check_output`` has found usable.
        at_a_time: how many kernels run side by side; each takes one thread.
        progress: a bar that counts cells; None shows it on a terminal only.

    Raises:
        InputError: the ``notebooks`` extra is not installed.
    """
    from tqdm.auto import tqdm

    for package in ("papermill", "nbconvert", "sklearn"):
        import_extra(package)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it has to say, the record says
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")  # this environment's kernel, no other
    total = sum(cell.cell_type == "code" for job in jobs for cell in read_notebook(job.source).cells)
    hidden = None if progress is None else not progress
    kernels, stopped = dict[str, Any](), threading.Event()
    with tqdm(total=total, unit="cell", disable=hidden, leave=False) as bar, ThreadPoolExecutor(at_a_time) as pool:
        futures = [pool.submit(_run, job, kernels, stopped, bar.update) for job in jobs]
        try:
            for done in as_completed(futures):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stopped.set()
            for kernel in list(kernels.values()):
                with suppress(AttributeError):  # it has just ended, or not yet begun
                    kernel.provisioner.process.kill()


def _run(job: Job, kernels: dict[str, Any], stopped: threading.Event, tick: Callable[[], object]) -> Run:
    """Execute a notebook, wherever that ends, and write its results."""
    import papermill
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            kernels[job.name] = self
            # Outputs must not depend on the number of cores.
            await super().start_kernel(env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)

    cells, peak, error = list[str](), list[float | None]([None]), None

    def begin(cell: Any, **_: Any) -> None:
        cells.append(cell.source)
        if stopped.is_set():
            raise RuntimeError("interrupted")

    def end(**_: Any) -> None:
        peak.append(peak_gb(kernels[job.name].provisioner.pid))
        tick()

    start = time.perf_counter()
    job.file(".ipynb").unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            # papermill fills names in braces with parameters, in paths too.
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (job.source, job.file(".ipynb"))),
            job.parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            execution_timeout=job.cell_timeout,
            resources={"metadata": {"path": str(job.source.parent)}},
            kernel_manager_class=Kernel,
            extra_arguments=["--log-level=CRITICAL"],  # without its own remarks between our lines
            on_cell_execute=begin,
            on_cell_executed=end,
        )
    except Exception as failure:  # a cell that fails, a dead kernel, a cell past its time, a disk that is full
        raised = isinstance(failure, papermill.PapermillExecutionError)
        message = str(failure) if raised else f"{type(failure).__name__}: {failure}"
        message = message.replace("Kernel died", "Kernel died; is there enough memory?")
        source = [f"    {line}" for line in "".join(cells[-1:]).splitlines()]
        lines = [f"in cell [{len(cells)}]:", *source, *message.strip().splitlines()[-LAST_LINES:]]
        error = "interrupted" if stopped.is_set() else "\n".join(lines)
    return Run(job, _write_results(job, time.perf_counter() - start, peak[-1], error))


def _write_results(job: Job, seconds: float, memory: float | None, error: str | None) -> dict[str, Any]:
    """Write the page and the .json beside the executed notebook; returns what the .json holds."""
    from nbconvert import HTMLExporter

    notebook = source = read_notebook(job.source)
    with suppress(InputError):  # it was stopped before its first cell
        notebook = read_notebook(job.file(".ipynb"))
    versions = {name: version(name) for name in ("numpy", "scikit-learn", "torch", "torchvision")}
    record = {
        "notebook": job.name,
        "parameters": {name: known.default for name, known in read_parameters(source).items()} | job.parameters,
        "seconds": round(seconds, 1),
        "peak_gb": None if memory is None else round(memory, 3),
        "error": error,
        "versions": {"python": platform.python_version(), "dfqlib": dfqlib.__version__} | versions,
        "results": displayed_json(notebook),
    }
    # JSON knows neither infinity nor NaN: these become text.
    record = json.loads(json.dumps(record, default=str), parse_constant=lambda name: str(float(name)))
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": job.target.name}})
    with written_whole(job.file(".html")) as temporary:  # links to other notebooks lead to their pages
        temporary.write_text(re.sub(r'(href="[^":]+)\.ipynb', r"\1.html", page), encoding="utf-8")
    with written_whole(job.file(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def displayed_json(notebook: Any) -> dict[str, Any]:
    """Merge every dictionary that the notebook displayed as JSON."""
    merged: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shown = output.get("data", {}).get("application/json")
            merged |= shown if isinstance(shown, dict) else {}
    return merged
