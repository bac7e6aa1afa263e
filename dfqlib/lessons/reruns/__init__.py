"""Run a lesson again with other parameters, headless: ``python -m dfqlib rerun NOTEBOOK -p name value --output DIR``.

papermill executes and nbconvert renders; names, types and files are checked before, the results written after. Needs
the ``notebooks`` extra, which is imported when something is run, not before.
"""

from dfqlib.lessons.reruns.execution import Job, Run, check_output, run_jobs
from dfqlib.lessons.reruns.parameters import Parameter, read_notebook, read_parameters, values_for

__all__ = ["Job", "Parameter", "Run", "check_output", "read_notebook", "read_parameters", "run_jobs", "values_for"]
