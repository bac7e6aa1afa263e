"""Run a lesson again with other parameters, headless: ``python -m dfqlib rerun NOTEBOOK -p name value --output DIR``.

Needs the ``notebooks`` extra; papermill and its kind are imported when something is run, not before.
"""

from dfqlib.lessons.reruns.execution import Job, Run, check_output, fix_environment
from dfqlib.lessons.reruns.grid import read_grid, write_table
from dfqlib.lessons.reruns.parameters import Parameter, read_notebook, read_parameters, values_for
from dfqlib.lessons.reruns.processes import run_jobs

__all__ = [
    "Job", "Parameter", "Run", "check_output", "fix_environment", "read_grid", "read_notebook", "read_parameters",
    "run_jobs", "values_for", "write_table",
]  # fmt: skip
