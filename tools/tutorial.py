"""Run the notebooks headless and write build/tutorial/index.html.

    python tools/tutorial.py                                       every notebook of notebooks/
    python tools/tutorial.py notebooks/07_*.ipynb -p bits w2a2     one, with a parameter of its own

Each notebook leaves an executed copy, an HTML page and a JSON file, as `dfqlib rerun` does. Exit code: 0; 1 when a
notebook failed; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import sys
from pathlib import Path

from _notebooks import CELL_TIMEOUT, ROOT, find_notebooks
from tqdm.auto import tqdm

from dfqlib.errors import InputError
from dfqlib.lessons.reruns import Job, Run, check_output, read_notebook, read_parameters, run_jobs, values_for
from dfqlib.lessons.reruns.command import described
from dfqlib.lessons.reruns.parameters import read_pairs

INDEX = """<!DOCTYPE html>
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
"""


def row(run: Run) -> str:
    """A line of the index: the first heading of the notebook, or its name, and how it ran."""
    cells = read_notebook(run.job.source).cells
    headings = (re.search(r"^# (.+)$", cell.source, re.M) for cell in cells if cell.cell_type == "markdown")
    title = next((heading[1].strip() for heading in headings if heading), run.job.name)
    return (
        f'<tr><td><a href="{html.escape(run.job.name)}.html">{html.escape(title)}</a></td>'
        f"<td>{run.record['seconds']:.1f} s</td><td>{'failed' if run.error else 'ok'}</td></tr>"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description="Run the notebooks headless and write an HTML index.")
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders (default: notebooks/)")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "tutorial")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("-j", "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many at a time")
    options = parser.parse_intermixed_args(arguments)
    output, jobs = options.output.resolve(), []
    try:
        given = read_pairs(options.parameter)
        for name, source in find_notebooks(options.paths).items():
            known = read_parameters(read_notebook(source))
            values = values_for(known, given, source)
            jobs.append(Job(name, source, output / name, values, CELL_TIMEOUT))
        for job in jobs:
            check_output(job)
    except (FileNotFoundError, InputError) as error:
        parser.error(str(error))
    runs = {}
    try:
        for run in run_jobs(jobs, max(1, options.jobs), progress=None):
            runs[run.job.name] = run
            tqdm.write(described(run, max(len(job.name) for job in jobs)))  # above the bar
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    index = output / "index.html"
    index.write_text(INDEX.format(rows="\n".join(row(runs[job.name]) for job in jobs)), encoding="utf-8")
    failed = sum(run.error is not None for run in runs.values())
    shown = index.relative_to(Path.cwd()) if index.is_relative_to(Path.cwd()) else index
    print(f"{len(runs) - failed} of {len(runs)} notebooks ran. Read {shown}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
