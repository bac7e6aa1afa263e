"""The lowest versions that pyproject.toml allows, as a constraints file for pip.

    python tools/lowest.py notebooks,export,test     the core's dependencies and those of these extras

Runs before anything is installed. Exit code: 0, or 1 where the interpreter is newer than the lowest versions are.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest(project: dict[str, Any], extras: Iterable[str]) -> list[str]:
    """Each requirement ``name>=version`` of pyproject's table ``project`` as ``name==version``.

    Raises:
        ValueError: a requirement is not of that form.
    """
    wanted = project["dependencies"] + [line for name in extras for line in project["optional-dependencies"][name]]
    floors = []
    for line in dict.fromkeys(wanted):
        name, at_least, version = line.partition(">=")
        if not at_least or any(sign in version for sign in ",;<>=~! "):
            raise ValueError(f'"{line}" must be name>=version, so that its floor can be told')
        floors.append(f"{name}=={version}")
    return floors


def main(arguments: list[str]) -> int:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    python = project["requires-python"].removeprefix(">=")
    running = ".".join(map(str, sys.version_info[:2]))
    if running != python:
        print(
            f"The lowest versions are those of Python {python} and need not install on {running}: "
            f"remove .venv-lowest, then make test-lowest PYTHON=python{python}",
            file=sys.stderr,
        )
        return 1
    (extras,) = arguments
    print("\n".join(lowest(project, extras.split(","))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
