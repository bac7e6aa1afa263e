"""Run a lesson again with other parameters, headless: ``python -m dfqlib rerun NOTEBOOK -p name value --output DIR``.

papermill executes and nbconvert renders; names, types and files are checked before, the results written after. Needs
the ``notebooks`` extra, which is imported when something is run, not before.
"""

import argparse
import ast
import difflib
import importlib
import itertools
import json
import logging
import math
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import dfqlib
from dfqlib.errors import InputError
from dfqlib.training.files import check_writable, written_whole

__all__ = ["Job", "Parameter", "Run", "check_output", "read_notebook", "read_parameters", "run_jobs", "values_for"]

EXAMPLES = """\
examples:
  dfqlib rerun notebooks/07_w4a4_fine_tuning.ipynb -p bits w3a3 -p seed 1 --output out
      out/07_w4a4_fine_tuning.ipynb as executed, .html to read, .json with parameters, numbers, seconds, versions
  dfqlib rerun notebooks/07_w4a4_fine_tuning.ipynb --grid bits.yml --output out
      once for each run that bits.yml asks for, and all numbers in out/results.csv and out/results.json

bits.yml, every combination:        or a list of runs:
  bits: [w4a4, w3a3]                  - {bits: w4a4, steps: 100}
  seed: [0, 1, 2]                     - {bits: w2a2, steps: 400}

The notebook runs in the folder it lies in, with one thread: a relative path in a parameter starts there, not in the
current folder. Exit codes: 0 done, 1 a notebook failed (the rest was run), 2 an argument cannot be used (nothing was
run), 130 Ctrl-C (what was running is written as far as it came).
"""
SUFFIXES = (".ipynb", ".html", ".json")
LAST_LINES = 30  # of a traceback
_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text, in quotes"}
_FORMS = "write `name: [value, value]` lines for every combination, or `- name: value` items for a list of runs"


class Parameter(NamedTuple):
    """A parameter of a notebook; ``kind`` is None where its default is no number, truth value or text."""

    kind: type | None
    default: Any


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
        error: str | None = self.record["error"]
        return error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``dfqlib rerun``."""
    parser.add_argument("notebook", type=Path, metavar="NOTEBOOK", help="an .ipynb file with a cell tagged parameters")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="pairs",
        help="a value in place of the notebook's own, as often as needed",
    )  # fmt: skip
    parser.add_argument("--grid", type=Path, metavar="FILE", help="YAML file with the values to combine, or the runs")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="how many of a grid at a time (default: %(default)s)"
    )
    parser.add_argument("--cell-timeout", type=int, metavar="SECONDS", help="for one cell (default: no limit)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def rerun(options: argparse.Namespace) -> int:
    """Check everything, run, write; returns the exit code. InputError before anything is run."""
    from tqdm.auto import tqdm

    for name in ("jobs", "cell_timeout"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}={value} must be at least 1")
    jobs = _jobs(options)
    for job in jobs:
        check_output(job)
    written = [jobs[0].file(suffix) for suffix in SUFFIXES]
    if options.grid is not None:
        written = [options.output / "results.csv", options.output / "results.json"]
        for path in written:
            check_writable(path, "--output")
    runs: dict[str, Run] = {}
    for run in run_jobs(jobs, options.jobs, progress=False if options.quiet else None):
        runs[run.job.name] = run
        tqdm.write(described(run))  # above the bar
        if options.grid is not None:  # after each, so that a grid cut short leaves its table so far
            _write_table([runs[job.name] for job in jobs if job.name in runs], *written)
    failed = sum(run.error is not None for run in runs.values())
    print(f"{len(runs) - failed} of {len(runs)} ran; written: {', '.join(map(str, written))}")
    return 1 if failed else 0


def _jobs(options: argparse.Namespace) -> list[Job]:
    source: Path = options.notebook
    known = read_parameters(read_notebook(source))
    pairs = read_pairs(options.pairs)
    points = [{}] if options.grid is None else read_grid(options.grid)
    twice = sorted(pairs.keys() & {name for point in points for name in point})
    if twice:
        raise InputError(f'parameter "{twice[0]}" is given by -p and in the grid; leave it in one of them')
    jobs = []
    for number, point in enumerate(points, start=1):
        name = source.stem if options.grid is None else f"{source.stem}_{number:0{max(2, len(str(len(points))))}}"
        values = values_for(known, pairs | point, source)
        jobs.append(Job(name, source, options.output / name, values, options.cell_timeout))
    return jobs


def described(run: Run, width: int = 0) -> str:
    """A line that says how the run went, followed by its error if it has one."""
    peak = run.record["peak_gb"]
    parts = [
        f"{'FAILED' if run.error else 'ok':6} {run.job.name:{width}} {run.record['seconds']:6.1f} s",
        "" if peak is None else f"{peak:5.2f} GB",
        " ".join(f"{name}={value}" for name, value in run.job.parameters.items()),
    ]
    return "\n".join(filter(None, ["  ".join(filter(None, parts)), run.error]))


# What is asked for: papermill itself takes any name and any type


def read_pairs(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What -p gave, by name; InputError where a name is given twice."""
    read: dict[str, str] = {}
    for name, text in pairs:
        if name in read:
            raise InputError(f'parameter "{name}" is given twice, as "{read[name]}" and as "{text}"; leave one')
        read[name] = text
    return read


def read_grid(path: Path) -> list[dict[str, Any]]:
    """The parameters of each run that a YAML file asks for, in its order; InputError where it asks for none.

    The file holds a mapping of names to values or lists of values, of which every combination is run (the last name
    changes fastest), or a list of mappings, one for each run.
    """
    yaml = _import_extra("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise InputError(f'--grid="{path}" gives "{name}" twice in one mapping; leave one')
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise InputError(f'--grid="{path}" cannot be read ({error.strerror}); name a YAML file') from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f'--grid="{path}" is no YAML ({error}); {_FORMS}') from None
    if isinstance(content, dict):
        choices = [value if isinstance(value, list) else [value] for value in content.values()]
        content = [dict(zip(content, chosen, strict=True)) for chosen in itertools.product(*choices)]
    runs = content if isinstance(content, list) else []
    if not runs or not all(
        isinstance(run, dict) and run and all(isinstance(name, str) for name in run) for run in runs
    ):
        raise InputError(f'--grid="{path}" names no run; {_FORMS}')
    return runs


def read_notebook(path: Path) -> Any:
    """The notebook in a file, as nbformat 4; InputError where there is none."""
    nbformat = _import_extra("nbformat")
    if not path.is_file():
        raise InputError(f'notebook "{path}" does not exist; name an .ipynb file')
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises its own kinds, json's, OSError, and AttributeError for a list
        raise InputError(f'"{path}" is no Jupyter notebook ({type(error).__name__}); name an .ipynb file') from None


def read_parameters(notebook: Any) -> dict[str, Parameter]:
    """The variables that a notebook's cell tagged ``parameters`` assigns, by name, in its order.

    papermill's ``inspect_notebook`` reads line by line and misreads ``#`` and ``=`` in a string; hence the parser.

    Raises:
        InputError: the cell is no Python, or sets a variable otherwise than by ``name = value``.
    """
    cells = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    try:
        statements = ast.parse(cells[0] if cells else "").body  # as papermill, which replaces what the first cell sets
    except SyntaxError as error:
        raise InputError(f"the notebook's parameters cell is no Python ({error.msg}); correct it first") from None
    found: dict[str, Parameter] = {}
    for statement in statements:
        if isinstance(statement, ast.Expr | ast.Import | ast.ImportFrom | ast.Pass | ast.Assert):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or len(names) < len(targets):
            line = cells[0].splitlines()[statement.lineno - 1]
            raise InputError(
                f"the notebook's parameters cell has `{line}`; write one `name = value` line per parameter"
            )
        if statement.value is None:
            continue  # name: type
        try:
            default = ast.literal_eval(statement.value)
            kind = type(default).__name__
        except (ValueError, TypeError):
            default, kind = ast.unparse(statement.value), ""
        if isinstance(statement, ast.AnnAssign):
            kind = ast.unparse(statement.annotation)
        parameter = Parameter({each.__name__: each for each in _KINDS}.get(kind), default)
        found |= dict.fromkeys(names, parameter)
    return found


def values_for(known: Mapping[str, Parameter], given: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The given values, each of the type that its parameter has; what the command line gives as text is read.

    Raises:
        InputError: a name that the notebook does not have, a value of another type, or a path that starts in the
            current folder instead of the notebook's.
    """
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise InputError(f'{source.stem} has no parameter "{name}"; it has {", ".join(known) or "none"}{hint}')
    values = {name: _typed(name, known[name], value) for name, value in given.items()}
    for name, value in values.items():
        if isinstance(value, str):
            _check_path(name, value, source)
    return values


def _typed(name: str, parameter: Parameter, value: Any) -> Any:
    kind = parameter.kind
    read: Any = value
    if isinstance(value, str) and kind is not str:
        text = value.strip().capitalize() if kind is bool else value.strip()
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            read = ast.literal_eval(text)
    if kind is float and type(read) is int:
        with suppress(OverflowError):
            read = float(read)
    finite = not isinstance(read, float) or math.isfinite(read)
    if kind is not None and not (type(read) is kind and finite):
        raise InputError(f"{name}={value!r} must be {_KINDS[kind]}, as its default {parameter.default!r} is")
    return read


def _check_path(name: str, value: str, source: Path) -> None:
    """Refuse a relative path that leads somewhere from the current folder, and nowhere from the notebook's."""
    path, folder = Path(value.removeprefix("folder:")), source.resolve().parent
    looks_like_one = "/" in value or value.startswith("folder:") or path.suffix != ""
    if looks_like_one and not path.is_absolute() and path.exists() and not (folder / path).exists():
        right = ("folder:" if value.startswith("folder:") else "") + os.path.relpath(path.resolve(), folder)
        raise InputError(
            f'{name}="{value}" starts in the current folder; a relative path starts in the notebook\'s: "{right}"'
        )


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


def _import_extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'running notebooks needs the package {name}; pip install "dfqlib[notebooks]"') from error


# Running


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
        _import_extra(package)
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
        peak.append(_peak_gb(kernels[job.name].provisioner.pid))
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


def _peak_gb(process: int) -> float | None:
    """The most memory that a process has held so far, as Linux counts it; None elsewhere."""
    with suppress(OSError):
        peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
        return round(int(peak[1]) / 1e6, 3) if peak else None
    return None


def _write_results(job: Job, seconds: float, peak_gb: float | None, error: str | None) -> dict[str, Any]:
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
        "peak_gb": peak_gb,
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


def flatten(results: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one level: ``{"top1": {"FP32": 99}}`` becomes ``{"top1.FP32": 99}``."""
    if not isinstance(results, dict | list):
        return {prefix: results}
    flat: dict[str, Any] = {}
    for name, value in results.items() if isinstance(results, dict) else enumerate(results):
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _write_table(runs: Sequence[Run], as_csv: Path, as_json: Path) -> None:
    """A row per run: its parameters, the numbers it displayed, seconds, memory, the error's last line."""
    pandas, rows = _import_extra("pandas"), []
    for record in (run.record for run in runs):
        first = {"run": record["notebook"]} | record["parameters"]
        last = {"seconds": record["seconds"], "peak_gb": record["peak_gb"]}
        last["error"] = record["error"].splitlines()[-1] if record["error"] else None
        # A result with the name of a parameter (images, say) gets a column of its own.
        taken = first.keys() | last.keys()
        numbers = {f"results.{k}" if k in taken else k: v for k, v in flatten(record["results"]).items()}
        rows.append(first | numbers | last)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with written_whole(as_csv) as temporary:
        pandas.DataFrame(rows, columns=columns, dtype=object).to_csv(temporary, index=False)
    with written_whole(as_json) as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
