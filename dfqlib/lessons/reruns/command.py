"""``dfqlib rerun``: one notebook with parameters of one's own, or once for each point of a grid."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfqlib.errors import InputError
from dfqlib.lessons.reruns.execution import Job, Run, check_output
from dfqlib.lessons.reruns.grid import read_grid, write_table
from dfqlib.lessons.reruns.parameters import read_notebook, read_parameters, values_for
from dfqlib.lessons.reruns.processes import run_jobs

__all__ = ["EXAMPLES", "add_arguments", "described", "read_pairs", "rerun"]

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
    """Check everything, run, write; returns the exit code.

    Raises:
        InputError: an argument cannot be used; nothing was run.
    """
    from tqdm.auto import tqdm

    for name in ("jobs", "cell_timeout"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}={value} must be at least 1")
    jobs = _jobs(options)
    for job in jobs:
        check_output(job)
    runs: dict[str, Run] = {}
    written = [f"{options.output / jobs[0].name}{suffix}" for suffix in (".ipynb", ".html", ".json")]
    for run in run_jobs(jobs, options.jobs, progress=False if options.quiet else None):
        runs[run.job.name] = run
        tqdm.write(described(run))  # above the bar
        if options.grid is not None:  # after each, so that a grid cut short leaves its table so far
            in_order = [runs[job.name] for job in jobs if job.name in runs]
            written = [str(path) for path in write_table(in_order, options.output)]
    failed = sum(run.error is not None for run in runs.values())
    print(f"{len(runs) - failed} of {len(runs)} ran; written: {', '.join(written)}")
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
        jobs.append(Job(name, source, options.output.resolve() / name, values, options.cell_timeout))
    return jobs


def read_pairs(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What -p gave, by name.

    Raises:
        InputError: a name is given twice.
    """
    read: dict[str, str] = {}
    for name, text in pairs:
        if name in read:
            raise InputError(f'parameter "{name}" is given twice, as "{read[name]}" and as "{text}"; leave one')
        read[name] = text
    return read


def described(run: Run, width: int = 0) -> str:
    """A line that says how the run went, followed by its error if it has one."""
    given: dict[str, Any] = run.job.parameters
    peak = run.record["peak_gb"]
    parts = [
        f"{'FAILED' if run.error else 'ok':6} {run.job.name:{width}} {run.record['seconds']:6.1f} s",
        "" if peak is None else f"{peak:5.2f} GB",
        " ".join(f"{name}={value}" for name, value in given.items()),
    ]
    line = "  ".join(part for part in parts if part)
    return f"{line}\n{run.error}" if run.error else line
