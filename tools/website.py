"""Build the site in build/site: the lessons as they were committed, their solutions, and the reference.

    python tools/website.py [--output DIR]

Nothing is executed and nothing is fetched. Sphinx reads a copy of docs/ with the notebooks beside it, in which what
only a running notebook can show is replaced: a widget by a remark, JSON by text to unfold. Exit code: that of Sphinx.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import sys
from pathlib import Path

import nbformat
from _notebooks import NOTEBOOKS, ROOT, find_notebooks
from nbformat import NotebookNode
from thumbnails import index_table

WIDGET = re.compile(r"^[A-Z]\w+\((children|value|description|options)=")  # how ipywidgets print themselves
WIDGET_REMARK = (
    "<p><em>Here the running lesson has sliders and buttons; the figure nearby shows where they start.</em></p>"
)


def lay_out(folder: Path) -> None:
    """Put what Sphinx reads into ``folder``, leaving alone what has not changed since the last time."""
    wanted = {}
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.is_file():
            wanted[folder / path.relative_to(ROOT / "docs")] = path.read_bytes()
    notebooks = {name: nbformat.read(path, as_version=4) for name, path in find_notebooks([NOTEBOOKS]).items()}
    for name, notebook in notebooks.items():
        wanted[folder / "lessons" / f"{name}.ipynb"] = nbformat.writes(still(notebook)).encode()
    table = index_table(notebooks="lessons/", pictures="_static/thumbnails/")
    wanted[folder / "lessons" / "table.md"] = f"{table}\n".encode()
    for path in folder.rglob("*"):
        if path.is_file() and path not in wanted and "generated" not in path.parts:
            path.unlink()
    for path, content in wanted.items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def still(notebook: NotebookNode) -> NotebookNode:
    """Replace the outputs that need a running notebook."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "application/json" in data:
                text = html.escape(json.dumps(data["application/json"], indent=2))
                output.data = {
                    "text/html": f"<details><summary>The results as JSON</summary><pre>{text}</pre></details>"
                }
            elif data.keys() == {"text/plain"} and WIDGET.match(data["text/plain"]):
                output.data = {"text/html": WIDGET_REMARK}
    return notebook


def main(arguments: list[str] | None = None) -> int:
    """Build the site; return the exit code."""
    parser = argparse.ArgumentParser(description="Build the site from docs/ and the notebooks.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--strict", action="store_true", help="a warning is a failure")
    options = parser.parse_args(arguments)
    try:
        from sphinx.cmd.build import build_main
    except ImportError:
        parser.error('Sphinx is not installed: run `make site`, or pip install -c constraints.txt -e ".[site]"')
    output = options.output.resolve()
    work = output.with_name(f"{output.name}-work")
    lay_out(work / "source")
    strict = ["--fail-on-warning", "--keep-going"] if options.strict else []
    code = build_main([*strict, "--quiet", "-d", str(work / "doctrees"), str(work / "source"), str(output)])
    if code == 0:
        shown = Path(os.path.relpath(output / "index.html"))
        print(f"Read {shown}")
    return code


if __name__ == "__main__":
    sys.exit(main())
