"""What the benchmarks share: one runner of jobs, the rows that it keeps, and on what they were measured."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dfqlib.training import machine
from dfqlib.training.files import written_whole

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("DFQLIB_DATA") or ROOT.parent / "shared" / "data")
"""Where the folders of images and the checkpoints are, unless ``--data`` says otherwise."""
PACKAGES = ("dfqlib", "numpy", "onnx", "onnxruntime", "torch", "torchvision")

Row = dict[str, Any]
Job = tuple[dict[str, Any], dict[str, Any]]
"""What identifies a row of a results file, and the settings under which it is measured."""


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--again", action="store_true", help="measure also what the results file holds already")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the images and checkpoints")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results files")
    return parser


def run_apart(
    measure: Callable[[dict[str, Any]], Row], jobs: Iterable[Job], path: Path, args: argparse.Namespace,
    device: torch.device | str = "cpu",
) -> int:  # fmt: skip
    """Measure each job in a process of its own and write its row as soon as it is there.

    A row that the file holds under the same settings is not measured again: an interrupted command, started again, goes
    on where it stopped. A job that fails does not keep the others from running.

    Args:
        measure: from what identifies the row to what was measured; a function that can be pickled.
        jobs: see :data:`Job`; JSON's types only.
        path: the results file.
        args: the options of :func:`arguments`.
        device: what the rows were computed on.

    Returns:
        The exit code: 0, or 1 when a job failed.
    """
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    about = provenance(device)
    todo = [job for job in jobs if args.again or not any(holds(row, job) for row in rows_of(path))]
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(apart, measure, identity): (identity, settings) for identity, settings in todo}
        try:
            for future in as_completed(futures):
                identity, settings = futures[future]
                name = ", ".join(f"{key} {value}" for key, value in identity.items() if value != "")
                try:
                    measured = future.result()
                except Exception as error:
                    failed += 1
                    print(f"{name}: failed\n{error.__cause__ or error}", file=sys.stderr, flush=True)
                    continue
                row = {"job": identity, "settings": settings, **about, "date": time.strftime("%Y-%m-%d"), **measured}
                save(path, [*(old for old in rows_of(path) if old["job"] != identity), row])
                numbers = (f"{key} {value:.4g}" for key, value in measured.items() if isinstance(value, int | float))
                print(f"{name}: {', '.join(numbers)}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return int(failed > 0)


def apart(function: Callable[..., Any], *values: Any) -> Any:
    """What a function returns in a fresh process, whose peak memory and threads are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *values).result()


def holds(row: Row, job: Job) -> bool:
    """Whether a row is this job's and was measured under its settings."""
    identity, settings = job
    return row["job"] == identity and agree(row["settings"], json.loads(json.dumps(settings)))


def agree(old: Any, new: Any) -> bool:
    """Whether settings are the same; one that only one side knows was added or removed since."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(agree(old[name], new[name]) for name in old.keys() & new.keys())
    return bool(old == new)


def rows_of(path: Path) -> list[Row]:
    """The rows of a results file; none where there is no file."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write a results file; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": rows}, indent=1, default=dataclasses.asdict)
    with written_whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def provenance(device: torch.device | str) -> Row:
    """What each row says of how it came about."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # onnx and onnxruntime are extras
            continue
    return {"command": command(), "commit": commit(), "device": machine.processor(device), "versions": versions}


def command() -> str:
    """The command line, without the places of this machine."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if not (word in ("--data", "--output") and next(words, None))]
    return " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *kept])


def commit() -> str:
    """The commit of the code, and whether it was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "dfqlib", "benchmarks")
    return git("rev-parse", "--short=12", "HEAD") + (", changed" if changed else "")


def peak_gb() -> float:
    """The most memory that this process has had; Linux's ru_maxrss would count the process that started it, too."""
    return machine.peak_gb() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
