"""A lesson started the wrong way says in one line what to do: its first cells, run here without a kernel."""

from __future__ import annotations

import ast
import functools
import socket
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from dfqlib import lessons, plots, widgets
from dfqlib.errors import InputError

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
EVERY = [pytest.param(path, id=str(path.relative_to(FOLDER))) for path in sorted(FOLDER.rglob("[0-9][0-9]_*.ipynb"))]
CHECK, OPEN = "check_parameters(", "subject = "  # in the cell that checks the parameters, that opens the network


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
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits are read once for all lessons, and the tests that follow keep their random numbers and figures."""
    original = lessons.open_subject

    @functools.wraps(original)
    def open_subject(*arguments: Any) -> lessons.Subject:
        return open_once(*arguments) if arguments == ("digits", "", "", "") else original(*arguments)

    monkeypatch.setattr(lessons, "open_subject", open_subject)
    monkeypatch.setattr(widgets, "seed_everything", lambda seed: None)
    monkeypatch.setattr(plots, "use_style", lambda: None)


def start(path: Path, through: str, **changes: Any) -> None:
    """Run the first cells, the last being the one that contains ``through``, with parameters as papermill puts them."""
    assert any(through in source for source in code(path))
    scope: dict[str, Any] = {}
    for number, source in enumerate(code(path)):
        exec(source, scope)
        if number == 0:
            scope |= changes
        if through in source:
            return


@pytest.mark.parametrize("path", EVERY)
def test_without_the_package_it_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dfqlib", None)
    with pytest.raises(ImportError, match=r"needs the dfqlib package .*: run `pip install -e .*`") as raised:
        start(path, "except ImportError")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", EVERY)
def test_a_parameter_of_the_wrong_type_is_named(path: Path) -> None:
    for name, default in parameters(path).items():
        with pytest.raises(InputError, match=name) as raised:
            start(path, CHECK, **{name: 7 if isinstance(default, str) else "seven"})
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", EVERY)
def test_it_does_not_matter_where_it_is_started(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start(path, CHECK)
    if "checkpoint" in parameters(path):
        with pytest.raises(InputError, match="does not exist; a relative path starts in the lesson's folder"):
            start(path, OPEN, checkpoint="models/mine.pt")


@pytest.mark.parametrize("path", EVERY)
def test_without_network_it_says_what_to_give_instead(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("network is unreachable")

    if "data_root" not in parameters(path):
        return
    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    with pytest.raises(InputError, match=r"cannot be fetched .*; give data_root= of a copy") as raised:
        start(path, OPEN, dataset="cifar10", data_root=str(tmp_path))
    assert "\n" not in str(raised.value)
