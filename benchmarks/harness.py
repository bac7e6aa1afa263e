"""What the benchmarks share: where things lie, how results are kept, on which machine and in how much memory."""

import json
import os
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("DFQLIB_DATA") or ROOT.parent / "shared" / "data")
"""Where the folders of images and the checkpoints are looked for unless ``--data`` says otherwise."""


def provenance(device: str) -> dict[str, Any]:
    """What every results file says beside its command and its numbers."""
    import torch

    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {"device": device, "versions": versions, "date": time.strftime("%Y-%m-%d")}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a results file; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def save_picture(path: Path, picture: bytes) -> None:
    """Write a figure's bytes (``plots.png``)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)


def against(ways: dict[str, Any], way: str, base: str) -> float:
    """How many times as fast as ``base`` a way of results/speed.json is: the median of the rounds' ratios."""
    pairs = zip(ways[way]["ratios"], ways[base]["ratios"], strict=True)
    return statistics.median(ratio / other for ratio, other in pairs)


def peak_gb() -> float:
    """The most memory that this process has had; Linux's ru_maxrss would count the process that started it, too."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
