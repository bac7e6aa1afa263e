"""A lesson started the wrong way says in one line what to do: its first cells, run here without a kernel."""

from __future__ import annotations

import ast
import functools
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

from dfqlib import lessons
from dfqlib.errors import InputError
from dfqlib.lessons import plots

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
EVERY = [pytest.param(path, id=str(path.relative_to(FOLDER))) for path in sorted(FOLDER.rglob("[0-9][0-9]_*.ipynb"))]
BEGIN = re.compile(r"check_parameters\(|open_subject\(|QuantSpec\.parse\(")  # what a lesson does with its parameters
FEW = 8  # code cells, within which that is done


@functools.cache
def code(path: Path) -> tuple[str, ...]:
    return tuple(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


def parameters(path: Path) -> dict[str, Any]:
    statements = ast.parse(code(path)[0]).body
    return {s.target.id: ast.literal_eval(s.value) for s in statements}  # type: ignore[attr-defined]


@functools.cache
def open_once(*arguments: str) -> lessons.Subject:
    return lessons.open_subject.__wrapped__(*arguments)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The digits are read once for all lessons, and the tests that follow keep their algorithms and figures."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    original = lessons.open_subject

    @functools.wraps(original)
    def open_subject(*arguments: Any) -> lessons.Subject:
        return open_once(*arguments) if arguments == ("digits", "", "", "") else original(*arguments)

    monkeypatch.setattr(lessons, "open_subject", open_subject)
    monkeypatch.setattr(plots, "use_style", lambda: None)
    yield
    torch.use_deterministic_algorithms(deterministic)


def beginning(path: Path) -> int:
    """How many code cells there are up to the last one that does something with the parameters."""
    return max((i for i, source in enumerate(code(path)[:FEW], start=1) if BEGIN.search(source)), default=2)


def used(path: Path) -> set[str]:
    """The parameters that the code reads."""
    later = "\n".join(code(path)[1:])
    return {name for name in parameters(path) if re.search(rf"\b{name}\b", later)}


def start(path: Path, cells: int, **changes: Any) -> None:
    """Run the first code cells, with parameters as papermill would put them there."""
    scope: dict[str, Any] = {}
    for number, source in enumerate(code(path)[:cells]):
        exec(source, scope)
        if number == 0:
            scope |= changes


@pytest.mark.parametrize("path", EVERY)
def test_without_the_package_it_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["dfqlib", *(name for name in sys.modules if name.startswith("dfqlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs the dfqlib package .*: run `pip install -e .*`") as raised:
        start(path, 2)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", EVERY)
def test_a_parameter_of_the_wrong_type_is_named(path: Path) -> None:
    for name in sorted(used(path)):
        wrong = 7 if isinstance(parameters(path)[name], str) else "seven"
        with pytest.raises(InputError, match=name) as raised:
            start(path, beginning(path), **{name: wrong})
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", EVERY)
def test_it_does_not_matter_where_it_is_started(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start(path, 3)
    if "checkpoint" in used(path):
        with pytest.raises(InputError, match="does not exist; a relative path starts in the lesson's folder"):
            start(path, FEW, checkpoint="models/mine.pt")


@pytest.mark.parametrize("path", EVERY)
def test_without_network_it_says_what_to_give_instead(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("network is unreachable")

    if "data_root" not in used(path):
        return
    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    with pytest.raises(InputError, match=r"cannot be fetched .*; give data_root= of a copy") as raised:
        start(path, FEW, dataset="cifar10", data_root=str(tmp_path))
    assert "\n" not in str(raised.value)
