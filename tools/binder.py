"""Binder: the address that opens a fork's lessons there, and a rehearsal of what it does with them.

    python tools/binder.py url                 for the remote "origin" of this clone
    python tools/binder.py check [FOLDER]      in a new environment (minutes, some GB); FOLDER is kept, if given

Without a container engine and without conda the rehearsal comes as near as it can: a clean clone; a virtual environment
with what binder/environment.yml asks for, by the packages' names on the package index; binder/postBuild; every
import of the lessons; JupyterLab and lesson 01 through binder/start. Exit code: 0, or 1 and the step that failed.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from urllib.parse import quote, urlsplit

import nbformat
import yaml
from _notebooks import ROOT, code_cells, find_notebooks

FIRST = "notebooks/01_toy_boundary_matching.ipynb"
PIP_NAMES = {"pytorch": "torch"}  # where conda-forge's differ


def launch_address(remote: str) -> str:
    """The address that opens lesson 01 in JupyterLab, from a repository's default branch.

    Args:
        remote: the repository as git knows it: https or ssh, with or without user and password, which are left out.

    Raises:
        ValueError: Binder cannot reach a repository there.
    """
    short = re.fullmatch(r"(?:[^@/]+@)?([^:/]+\.[^:/]+):(?!/)(.+)", remote)  # git@host:owner/name
    host, path = (short[1], short[2]) if short else (urlsplit(remote).hostname or "", urlsplit(remote).path)
    path = path.strip("/").removesuffix(".git")
    if "." not in host or not path or remote.startswith("file:"):
        raise ValueError(f'"{remote}" is no address on the web: push to a public repository and clone it from there')
    place = f"gh/{path}" if host == "github.com" else f"git/{quote(f'https://{host}/{path}', safe='')}"
    return f"https://mybinder.org/v2/{place}/HEAD?urlpath=lab/tree/{FIRST}"


def pip_requirements(environment: Path) -> tuple[str, list[str]]:
    """What a conda environment asks for: the version of Python, and the rest by the names on the package index."""
    python, wanted = "", []
    for line in yaml.safe_load(environment.read_text(encoding="utf-8"))["dependencies"]:
        name, rest = re.fullmatch(r"([\w-]+)(.*)", line).groups()  # type: ignore[union-attr]
        if name == "python":
            python = rest.lstrip("=")
        elif name != "pip":
            wanted.append(PIP_NAMES.get(name, name) + rest)
    return python, wanted


def imported_modules(folder: Path) -> set[str]:
    """The modules that the notebooks below a folder import."""
    found: set[str] = set()
    for path in find_notebooks([folder]).values():
        for cell in code_cells(nbformat.read(path, as_version=4)):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module)
    return found


def check(folder: Path) -> None:
    """Rehearse in ``folder``; the first command that fails ends it."""
    clone, binaries = folder / "clone", folder / "environment" / "bin"
    start, modules = clone / "binder" / "start", sorted(imported_modules(ROOT / "notebooks"))
    python, wanted = pip_requirements(ROOT / "binder" / "environment.yml")
    print(f"- an environment with {len(wanted)} packages (Binder's Python is {python}, ours {sys.version.split()[0]})")
    venv.create(binaries.parent, with_pip=True)
    for title, *command in (
        ("a clean clone", "git", "clone", "--quiet", "--no-hardlinks", ROOT, clone),
        ("those packages", binaries / "pip", "install", "--quiet", "-c", clone / "constraints.txt", *wanted),
        ("binder/postBuild", clone / "binder" / "postBuild"),
        (f"the lessons' {len(modules)} imports", binaries / "python", "-P", "-c", f"import {', '.join(modules)}"),
        ("the command line", binaries / "dfqlib", "--help"),
        ("JupyterLab, through binder/start", start, "jupyter", "lab", "--version"),
        ("lesson 01, through binder/start", start, "jupyter", "execute", "--kernel_name=python3", FIRST),
    ):
        print(f"- {title}", flush=True)
        run(list(map(str, command)), clone if clone.exists() else folder, binaries)


def run(command: list[str], folder: Path, binaries: Path) -> None:
    """Run a command in the new environment; one that fails ends the rehearsal."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JUPYTER"))}
    settings |= {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(binaries.parent)}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ... failed:\n{(done.stdout + done.stderr)[-3000:]}")


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Binder: a fork's address there, and a rehearsal.")
    parser.add_argument("what", choices=("url", "check"))
    parser.add_argument("folder", nargs="?", type=Path, help="where to rehearse (default: a temporary folder)")
    options = parser.parse_args(arguments)
    if options.what == "url":
        asked = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
        try:
            print(launch_address(asked.stdout.strip()))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        check(options.folder.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))
    print("Binder would find what it needs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
