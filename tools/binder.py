"""Binder: the address that opens a fork's lessons there, and a rehearsal of what it does with them.

    python tools/binder.py url                 for the remote "origin" of this clone
    python tools/binder.py check [FOLDER]      in a new environment (minutes, some GB); FOLDER is kept, if given

Without a container engine and without conda the rehearsal comes as near as it can: a clean clone; a virtual environment
with what binder/environment.yml asks for, by the packages' names on the package index; binder/postBuild; every
import of the lessons; lesson 01 served by JupyterLab through binder/start; the Dockerfile that repo2docker would build.
Exit code: 0, or 1 and the step that failed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path
from urllib.parse import quote, urlsplit

import nbformat
import yaml
from _notebooks import ROOT, code_cells, find_notebooks

FIRST = "notebooks/01_toy_boundary_matching.ipynb"
PIP_NAMES = {"pytorch": "torch"}  # where conda-forge's differ
PATIENCE = 120  # seconds for JupyterLab to start


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
    """Rehearse in ``folder``; an assertion or a failed command says what went wrong."""
    clone, environment = folder / "clone", folder / "environment"
    say("a clean clone")
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, clone)

    python, wanted = pip_requirements(clone / "binder" / "environment.yml")
    say(f"an environment with {len(wanted)} packages (Binder's Python is {python}, ours {sys.version.split()[0]})")
    venv.create(environment, with_pip=True)
    binaries = environment / "bin"
    path = os.pathsep.join((str(binaries), os.environ["PATH"]))
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JUPYTER"))}
    settings |= {"PATH": path, "VIRTUAL_ENV": str(environment)}
    run(binaries / "pip", "install", "--quiet", "-c", clone / "constraints.txt", *wanted, env=settings)

    say("binder/postBuild")
    run(clone / "binder" / "postBuild", cwd=clone, env=settings)
    modules = sorted(imported_modules(clone / "notebooks"))
    say(f"the lessons' {len(modules)} imports")
    run(binaries / "python", "-c", f"import {', '.join(modules)}", cwd=folder, env=settings)
    run(binaries / "python", "-m", "dfqlib", "--help", cwd=folder, env=settings)

    say("lesson 01 in JupyterLab, through binder/start")
    serve_first(clone, folder / "runtime", settings)

    say("the Dockerfile")
    run(binaries / "pip", "install", "--quiet", "jupyter-repo2docker", env=settings)
    rendered = run(binaries / "jupyter-repo2docker", "--no-build", "--debug", clone, cwd=folder, env=settings)
    for line in ("binder/environment.yml", "RUN ./binder/postBuild", "binder/start"):
        assert line in rendered, f"the Dockerfile has no {line}"
    (folder / "Dockerfile").write_text(rendered, encoding="utf-8")


def serve_first(clone: Path, runtime: Path, settings: dict[str, str]) -> None:
    """Start JupyterLab as Binder does and ask it for lesson 01 and for its page."""
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    with subprocess.Popen(
        [clone / "binder" / "start", "jupyter", "lab", *options],
        cwd=clone,
        env=settings | {"JUPYTER_RUNTIME_DIR": str(runtime)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            entry = wait_for_entry(server, runtime)
            contents = json.loads(fetch(entry, f"api/contents/{FIRST}?content=0&"))
            assert contents["type"] == "notebook", contents
            assert b"JupyterLab" in fetch(entry, f"lab/tree/{FIRST}?")
            assert "python3" in json.loads(fetch(entry, "api/kernelspecs?"))["kernelspecs"]
        finally:
            server.terminate()


def wait_for_entry(server: subprocess.Popen[bytes], runtime: Path) -> dict[str, str]:
    """Wait until the server answers; return what it wrote down about itself."""
    for _ in range(2 * PATIENCE):
        assert server.poll() is None, "JupyterLab did not start"
        for path in runtime.glob("jpserver-*.json"):
            try:
                entry: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
                fetch(entry, "api/status?")
            except (OSError, ValueError):  # not listening yet, or not written to its end
                continue
            return entry
        time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not start in {PATIENCE} s")


def fetch(entry: dict[str, str], what: str) -> bytes:
    """Ask the server for something."""
    with urllib.request.urlopen(f"{entry['url']}{what}token={entry['token']}", timeout=PATIENCE) as answer:
        content: bytes = answer.read()
    return content


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it wrote; one that fails ends the rehearsal."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command[:3]))} ... failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


def say(step: str) -> None:
    """Name the step that begins."""
    print(f"- {step}", flush=True)


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
