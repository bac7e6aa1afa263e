"""The lessons on a real network: each one rerun on CIFAR-10's ResNet-20, its numbers and its figures kept.

    python benchmarks/lessons.py                     # 02 to 11, two at a time
    python benchmarks/lessons.py --only 07 10 --jobs 1

Needs the CIFAR-10 test folder and the ResNet-20 checkpoint under ``--data`` (default: $DFQLIB_DATA, then
../shared/data). Writes results/lessons/<lesson>.json (parameters, numbers, seconds, peak memory, versions) and
.png (its charts; grids of pictures are left out, since the data set's are not ours to pass on). A lesson that fails
leaves what was there before. Exit code: 0, or 1 when one failed.
"""

import argparse
import base64
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import CHECKPOINTS
from harness import DATA, ROOT
from PIL import Image

from dfqlib.lessons.reruns import Job, Run, read_notebook, read_parameters, run_jobs, values_for
from dfqlib.training.files import written_whole
from dfqlib.training.machine import processor

FOR_CIFAR: dict[str, dict[str, str]] = {
    "05": {"rounds": "120", "batch": "32"},
    "06": {"runs": "1", "warm_up": "8", "steps": "10"},
    "08": {"runs": "1", "rounds": "3"},
    "09": {"runs": "1"},
}
"""What lessons that make many runs recommend for a larger network, so that a few minutes are enough."""
WIDTH = 640
"""Of a figure in the picture, in pixels."""


def jobs_of(only: list[str], data: Path, output: Path) -> list[Job]:
    """One job per lesson that takes a data set, the first one has none."""
    notebooks = ROOT / "notebooks"
    # Relative to the notebooks, where they run: a record must not tell of anybody's folders.
    given = {
        "dataset": "folder:" + os.path.relpath(data / "cifar10" / "test", notebooks),
        "checkpoint": os.path.relpath(data / "models" / CHECKPOINTS["cifar10_resnet20"], notebooks),
    }
    jobs = []
    for source in sorted(notebooks.glob("[01][0-9]_*.ipynb")):
        known = read_parameters(read_notebook(source))
        if "dataset" in known and (not only or source.name[:2] in only):
            values = values_for(known, given | FOR_CIFAR.get(source.name[:2], {}), source)
            jobs.append(Job(source.stem, source, output / source.stem, values))
    return jobs


def keep(run: Run, folder: Path) -> None:
    """Write the record and the figures of a lesson that ran."""
    record: dict[str, Any] = {
        "command": f"python benchmarks/lessons.py --only {run.job.name[:2]}",
        "device": f"CPU, 1 thread of {processor()}",
        "date": time.strftime("%Y-%m-%d"),
        **run.record,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / f"{run.job.name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, default=str) + "\n")
    executed = read_notebook(run.job.target.with_name(f"{run.job.name}.ipynb"))
    with written_whole(folder / f"{run.job.name}.png") as temporary:
        temporary.write_bytes(stacked(figures(executed)))


def figures(notebook: Any) -> list[Image.Image]:
    """Every chart among a notebook's outputs."""
    found = []
    for cell in notebook.cells:
        for output in [] if "image_grid(" in cell.source else cell.get("outputs", []):
            content = output.get("data", {}).get("image/png")
            if content:
                found.append(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
    return found


def stacked(pictures: list[Image.Image]) -> bytes:
    """The pictures in two columns, each WIDTH wide, as a PNG of 64 colours."""
    scaled = [p.resize((WIDTH, round(p.height * WIDTH / p.width)), Image.Resampling.LANCZOS) for p in pictures]
    half = -(-len(scaled) // 2)
    columns = [scaled[:half], scaled[half:]]
    sheet = Image.new("RGB", (2 * WIDTH, max(sum(p.height for p in column) for column in columns)), "white")
    for index, column in enumerate(columns):
        top = 0
        for picture in column:
            sheet.paste(picture, (index * WIDTH, top))
            top += picture.height
    content = io.BytesIO()
    sheet.quantize(64).save(content, format="PNG", optimize=True)
    return content.getvalue()


def main() -> int:
    """Run what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="numbers of lessons")
    parser.add_argument("--jobs", type=int, default=2, help="lessons at a time")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for run in run_jobs(jobs_of(args.only, args.data, Path(folder)), args.jobs):
            seconds, peak = run.record["seconds"], run.record["peak_gb"]
            print(f"{'FAILED' if run.error else 'ok':6} {run.job.name:32} {seconds:6.1f} s  {peak} GB", flush=True)
            if run.error:
                print(run.error, file=sys.stderr, flush=True)
                failed = True
            else:
                keep(run, ROOT / "results" / "lessons")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
