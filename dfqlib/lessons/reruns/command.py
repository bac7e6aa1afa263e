"""``dfqlib rerun``: one notebook with parameters of one's own, or once for each run of a YAML file."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfqlib.errors import InputError
from dfqlib.lessons.reruns.execution import SUFFIXES, Job, Run, check_output, run_jobs
from dfqlib.lessons.reruns.parameters import (
    import_extra,
    read_grid,
    read_notebook,
    read_pairs,
    read_parameters,
    values_for,
)
from dfqlib.training.files import check_writable, written_whole

__all__ = ["EXAMPLES", "add_arguments", "described", "flatten", "rerun"]

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
    pandas, rows = import_extra("pandas"), []
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
