"""A notebook's parameters: those of its cell tagged ``parameters``, and values for them that are checked beforehand.

papermill itself takes any name and any type without a word.
"""

import ast
import importlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqlib.errors import InputError

__all__ = ["Parameter", "import_extra", "read_notebook", "read_parameters", "values_for"]

_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text, in quotes"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook.

    Attributes:
        name: of the variable.
        kind: int, float, bool or str; None when the notebook commits itself to none of them.
        default: its value in the notebook; the source text when that is no literal.
    """

    name: str
    kind: type | None
    default: Any


def import_extra(name: str) -> Any:
    """A package of the ``notebooks`` extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'running notebooks needs the package {name}; pip install "dfqlib[notebooks]"') from error


def read_notebook(path: Path) -> Any:
    """The notebook in a file, as nbformat 4.

    Raises:
        InputError: no such file, or it holds no notebook.
    """
    nbformat = import_extra("nbformat")
    if not path.is_file():
        raise InputError(f'notebook "{path}" does not exist; name an .ipynb file')
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises its own kinds, json's, OSError, and AttributeError for a list
        raise InputError(f'"{path}" is no Jupyter notebook ({type(error).__name__}); name an .ipynb file') from None


def read_parameters(notebook: Any) -> dict[str, Parameter]:
    """The variables that a notebook's cell tagged ``parameters`` assigns, by name, in its order.

    Args:
        notebook: as ``read_notebook`` returns it.

    Raises:
        InputError: the cell is no Python.
    """
    cells = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    try:
        statements = ast.parse("\n".join(cells)).body
    except SyntaxError as error:
        raise InputError(f"the notebook's parameters cell is no Python ({error.msg}); correct it first") from None
    found: dict[str, Parameter] = {}
    for statement in statements:
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, annotation = [statement.target], ast.unparse(statement.annotation)
        elif isinstance(statement, ast.Assign):
            targets, annotation = statement.targets, ""  # type: ignore[assignment]
        else:
            continue
        assert statement.value is not None
        default, literal = _literal(ast.unparse(statement.value))
        declared = {kind.__name__: kind for kind in _KINDS}.get(annotation)
        inferred = type(default) if literal and not annotation and type(default) in _KINDS else None
        for name in map(ast.unparse, targets):
            found[name] = Parameter(name, declared or inferred, default)
    return found


def values_for(known: Mapping[str, Parameter], given: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The given values, each of the type that its parameter has; what the command line gives as text is read.

    Args:
        known: as ``read_parameters`` returns it.
        given: name → value, or its text.
        source: file of the notebook, whose folder is where relative paths start.

    Raises:
        InputError: a name that the notebook does not have, a value of another type, or a path that starts in the
            current folder instead of the notebook's.
    """
    for name in given:
        if name not in known:
            raise InputError(f'{source.stem} has no parameter "{name}"; it has {", ".join(known) or "none"}')
    values = {name: _typed(known[name], value) for name, value in given.items()}
    for name, value in values.items():
        if isinstance(value, str):
            _check_path(name, value, source)
    return values


def _typed(parameter: Parameter, value: Any) -> Any:
    kind = parameter.kind
    read: Any = value
    if isinstance(value, str) and kind is not str:
        read, _ = _literal(value.capitalize() if kind is bool else value)
    if kind is float and type(read) is int:
        read = float(read)
    finite = not isinstance(read, float) or math.isfinite(read)
    if kind is not None and not (type(read) is kind and finite):
        raise InputError(f"{parameter.name}={value!r} must be {_KINDS[kind]}, as its default {parameter.default!r} is")
    return read


def _literal(text: str) -> tuple[Any, bool]:
    """What ``text`` means as a Python literal, and whether it is one; otherwise it stays text."""
    try:
        return ast.literal_eval(text.strip()), True
    except (SyntaxError, ValueError):
        return text, False


def _check_path(name: str, value: str, source: Path) -> None:
    """Refuse a relative path that leads somewhere from the current folder, and nowhere from the notebook's."""
    path, folder = Path(value.removeprefix("folder:")), source.resolve().parent
    looks_like_one = "/" in value or value.startswith("folder:") or path.suffix != ""
    if looks_like_one and not path.is_absolute() and path.exists() and not (folder / path).exists():
        seen = os.path.relpath(path.resolve(), folder)
        remedy = f"folder:{seen}" if value.startswith("folder:") else seen
        raise InputError(
            f'{name}="{value}" starts in the current folder; a relative path starts in the notebook\'s: "{remedy}"'
        )
