"""The lessons on a real network: each one rerun on CIFAR-10's ResNet-20, its numbers and its charts kept.

    python benchmarks/lessons.py                     # 02 to 11
    python benchmarks/lessons.py --only 07 10

Needs the CIFAR-10 test folder and the ResNet-20 checkpoint under ``--data`` (default: $DFQLIB_DATA, then
../shared/data). Writes results/lessons.json (parameters, numbers, seconds, peak memory) and each lesson's charts in
results/lessons/. Grids of pictures are left out, since the data set's are not ours to pass on.
"""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
from cases import CHECKPOINTS, missing
from harness import ROOT, Job, Row, arguments, run_apart
from PIL import Image

NETWORK = "cifar10_resnet20"
FOR_CIFAR: dict[str, dict[str, str]] = {
    "05": {"rounds": "120", "batch": "32"},
    "06": {"runs": "1", "warm_up": "8", "steps": "10"},
    "08": {"runs": "1", "rounds": "3"},
    "09": {"runs": "1"},
}
"""What lessons that make many runs recommend for a larger network, so that a few minutes are enough."""
WIDTH = 640
"""Of a chart in the picture, in pixels."""


def measure(job: dict[str, Any], data: Path, output: Path) -> Row:
    """Run a lesson through the command line, keep its charts, return its record."""
    name = job["lesson"]
    # Relative to the notebooks, where they run: a record must not tell of anybody's folders.
    parameters = FOR_CIFAR.get(name[:2], {}) | {
        "dataset": "folder:" + os.path.relpath(data / "cifar10" / "test", ROOT / "notebooks"),
        "checkpoint": os.path.relpath(data / "models" / CHECKPOINTS[NETWORK], ROOT / "notebooks"),
    }
    with tempfile.TemporaryDirectory() as folder:
        words = [word for pair in parameters.items() for word in ("-p", *pair)]
        started = [sys.executable, "-m", "dfqlib", "rerun", f"notebooks/{name}.ipynb", "--quiet", "--output", folder]
        subprocess.run([*started, *words], cwd=ROOT, check=True)
        record: Row = json.loads(Path(folder, f"{name}.json").read_text(encoding="utf-8"))
        charts = charts_of(nbformat.read(Path(folder, f"{name}.ipynb"), as_version=4))
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.png").write_bytes(stacked(charts))
    return {key: record[key] for key in ("parameters", "seconds", "peak_gb", "results")}


def charts_of(notebook: Any) -> list[Image.Image]:
    """Every chart among a notebook's outputs."""
    outputs = [out for cell in notebook.cells if "image_grid(" not in cell.source for out in cell.get("outputs", [])]
    contents = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for content in contents]


def stacked(pictures: list[Image.Image]) -> bytes:
    """The pictures in two columns, each WIDTH wide, as a PNG of 64 colors."""
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
    """Run what the command line names."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="numbers of lessons")
    args = parser.parse_args()
    if lacking := missing(NETWORK, args.data):
        print(f"left out, there is {lacking} (see --data)", file=sys.stderr)
        return 0
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("[01][0-9]_*.ipynb"))][1:]  # the first has no data
    wanted = [name for name in names if not args.only or name[:2] in args.only]
    jobs: list[Job] = [({"lesson": name}, FOR_CIFAR.get(name[:2], {})) for name in wanted]
    measuring = partial(measure, data=args.data.resolve(), output=args.output / "lessons")
    return run_apart(measuring, jobs, args.output / "lessons.json", args)


if __name__ == "__main__":
    sys.exit(main())
