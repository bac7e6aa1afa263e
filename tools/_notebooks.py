"""What running the notebooks headless has in common: which ones, and in which environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
KERNEL = "python3"
CELL_TIMEOUT = 300  # seconds, as for nbval
QUIET_KERNEL = ["--log-level=CRITICAL"]  # without its own remarks between our lines


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
            folder = path
            files = [file for file in path.rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts]
        else:
            raise FileNotFoundError(f"no notebook or folder {path}")
        # A folder's own notebooks come before those of its subfolders.
        for file in sorted(files, key=lambda file: (len(file.parts), file)):
            found[str(file.relative_to(folder).with_suffix(""))] = file
    if not found:
        raise FileNotFoundError(f"no notebook in {', '.join(map(str, paths)) or NOTEBOOKS}")
    return found


def fix_environment() -> None:
    """Make kernels start from this interpreter's environment, with one thread.

    Outputs must not depend on the number of cores, and a ``python3`` kernel that is registered elsewhere on
    the machine must not be taken for ours.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
