"""A grid of reruns: the combinations a YAML file asks for, and the one table they end in."""

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfqlib.errors import InputError
from dfqlib.lessons.reruns.execution import Run
from dfqlib.lessons.reruns.parameters import import_extra
from dfqlib.training.files import written_whole

__all__ = ["combinations", "flatten", "read_grid", "write_table"]

_FORMS = "write `name: [value, value]` lines for every combination, or `- name: value` items for a list of runs"


def read_grid(path: Path) -> list[dict[str, Any]]:
    """The parameters of each run that a YAML file asks for, in its order.

    Args:
        path: holds a mapping of parameters to a value or a list of values (every combination is run, the last
            parameter changing fastest), or a list of mappings (each is a run).

    Raises:
        InputError: no such file, no YAML, or neither of the two forms.
    """
    yaml = import_extra("yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f'--grid="{path}" cannot be read ({error.strerror}); name a YAML file') from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise InputError(f'--grid="{path}" is no YAML ({what}); {_FORMS}') from None
    runs = combinations(content) if isinstance(content, dict) else content
    if not runs or not isinstance(runs, list) or not all(map(_names_parameters, runs)):
        raise InputError(f'--grid="{path}" names no run; {_FORMS}')
    return runs


def _names_parameters(run: Any) -> bool:
    return isinstance(run, dict) and bool(run) and all(isinstance(name, str) for name in run)


def combinations(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every choice of one value for each name; a value that is no list is the only choice."""
    choices = [value if isinstance(value, list) else [value] for value in values.values()]
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*choices)]


def flatten(results: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one level: ``{"top1": {"FP32": 99}}`` becomes ``{"top1.FP32": 99}``."""
    if not isinstance(results, (dict, list)):
        return {prefix: results}
    flat: dict[str, Any] = {}
    for name, value in results.items() if isinstance(results, dict) else enumerate(results):
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def write_table(runs: Sequence[Run], folder: Path) -> tuple[Path, Path]:
    """One row per run: its parameters, the numbers it displayed, seconds, memory, the error's last line.

    Args:
        runs: of one notebook.
        folder: where results.csv and results.json go, each whole or not at all.

    Returns:
        The two files.
    """
    rows = []
    for run in runs:
        record = run.record
        last = {name: record[name] for name in ("seconds", "peak_gb")}
        last["error"] = record["error"].splitlines()[-1] if record["error"] else None
        row = {"run": record["notebook"]} | record["parameters"]
        # A number that is called as a parameter is (how many images there were) has a column of its own.
        numbers = {
            f"results.{name}" if name in row or name in last else name: value
            for name, value in flatten(record["results"]).items()
        }
        rows.append(row | numbers | last)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    as_csv, as_json = folder / "results.csv", folder / "results.json"
    with written_whole(as_csv) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    with written_whole(as_json) as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return as_csv, as_json
