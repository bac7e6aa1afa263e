"""What the tools have in common: which notebooks there are, and which code their outputs come from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
CELL_TIMEOUT = 300  # seconds, as for nbval


def find_notebooks(paths: Sequence[Path]) -> dict[str, Path]:
    """Name each notebook in the given files and folders, in reading order.

    Args:
        paths: notebooks, or folders searched with their subfolders; none means notebooks/.

    Returns:
        Name (the path below its folder, without suffix) to file.

    Raises:
        FileNotFoundError: a path does not exist, or there is no notebook at all.
    """
    found: dict[str, Path] = {}
    for path in [path.resolve() for path in paths] or [NOTEBOOKS]:
        if path.is_file():
            folder = NOTEBOOKS if path.is_relative_to(NOTEBOOKS) else path.parent
            files = [path]
        elif path.is_dir():
            folder = NOTEBOOKS if path.is_relative_to(NOTEBOOKS) else path
            files = [file for file in path.rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts]
        else:
            raise FileNotFoundError(f"no notebook or folder {path}")
        # A folder's own notebooks come before those of its subfolders.
        for file in sorted(files, key=lambda file: (len(file.parts), file)):
            found[str(file.relative_to(folder).with_suffix(""))] = file
    if not found:
        raise FileNotFoundError(f"no notebook in {', '.join(map(str, paths)) or NOTEBOOKS}")
    return found


def code_cells(notebook: Any) -> list[Any]:
    """The code cells of a notebook, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_digest(notebook: Any) -> str:
    """Sixteen digits that change with any code cell; kept in a refreshed notebook, they tell which code was run."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()[:16]
