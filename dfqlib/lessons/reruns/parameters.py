"""A notebook's parameters and the values asked for, checked beforehand: papermill takes any name and any type."""

import ast
import difflib
import importlib
import itertools
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dfqlib.errors import InputError

__all__ = ["Parameter", "import_extra", "read_grid", "read_notebook", "read_pairs", "read_parameters", "values_for"]

_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text, in quotes"}
_FORMS = "write `name: [value, value]` lines for every combination, or `- name: value` items for a list of runs"


class Parameter(NamedTuple):
    """A parameter of a notebook; ``kind`` is None where its default is no number, truth value or text."""

    kind: type | None
    default: Any


def import_extra(name: str) -> Any:
    """A package of the ``notebooks`` extra; InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'running notebooks needs the package {name}; pip install "dfqlib[notebooks]"') from error


def read_notebook(path: Path) -> Any:
    """The notebook in a file, as nbformat 4; InputError where there is none."""
    nbformat = import_extra("nbformat")
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
            close = difflib.get_close_matches(str(name), known, 1)
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
    if not isinstance(read, str | int | float | list | dict | None):  # papermill would pass its text
        raise InputError(f"{name}={value!r} must be a number, text, a list, a dictionary or None")
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
    yaml = import_extra("yaml")

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
    if not runs or not all(isinstance(run, dict) and run for run in runs):
        raise InputError(f'--grid="{path}" names no run; {_FORMS}')
    return runs
