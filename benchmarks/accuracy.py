"""How good the recipes are: paired with the teacher, last epoch, several seeds, each run in a process of its own.

    python benchmarks/accuracy.py --recipe express --seeds 0 1 2               # every case of the list below
    python benchmarks/accuracy.py --case cifar10_w3a3 --seeds 0                # one of them
    python benchmarks/accuracy.py --recipe gdfq dsg --case cifar10_w4a4 --missing   # what no run has measured yet
    python benchmarks/accuracy.py --recipe calibrate --set clip=aciq --variant aciq  # with a setting of its own

Needs the CIFAR folders and checkpoints described in the README under ``--data`` (default: $DFQLIB_DATA, then
../shared/data); digits need nothing. Writes results/accuracy_<recipe>.json after each run, which the README's tables
are made from (``python benchmarks/tables.py``). A case that is measured again replaces its old rows.
"""

import argparse
import ast
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """A network, its test images and the widths; the protocol's name goes into the tables."""

    network: str
    bits: str
    protocol: str = "first and last at 8 bits"
    spec: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Job:
    """One run."""

    recipe: str
    case: str
    seed: int


REAL_IMAGES = 1024
"""How many training images the recipe "real" gets; all are seen several times in its steps."""


def _all_layers(bits: int) -> dict[str, Any]:
    return {"protocol": "all layers, per channel", "spec": (("edge_bits", bits), ("granularity", "channel"))}


CASES = {
    "digits_w2a2": Case("digits_resnet8", "w2a2"),
    "digits_w2a2_short": Case(
        "digits_resnet8",
        "w2a2",
        "first and last at 8 bits; 128 images, 150 + 200 steps",
        settings=(("images", 128), ("synthesis_steps", 150), ("steps", 200)),
    ),
    "cifar10_w4a4": Case("cifar10_resnet20", "w4a4"),
    "cifar10_w3a3": Case("cifar10_resnet20", "w3a3"),
    "cifar10_w4a4_all": Case("cifar10_resnet20", "w4a4", **_all_layers(4)),
    "cifar10_w3a3_all": Case("cifar10_resnet20", "w3a3", **_all_layers(3)),
    "cifar100_w4a4": Case("cifar100_resnet20", "w4a4"),
    "cifar100_w4a4_all": Case("cifar100_resnet20", "w4a4", **_all_layers(4)),
    "cifar10_resnet56_w4a4": Case("cifar10_resnet56", "w4a4"),
}
CHECKPOINTS = {
    "cifar10_resnet20": "resnet20-12fca82f.th",
    "cifar10_resnet56": "resnet56-4bfd9763.th",
    "cifar100_resnet20": "resnet20_cifar100.pth",
}


def load(network: str, data: Path) -> tuple[Any, Any, tuple[int, int, int]]:
    """The teacher, its test images and their shape."""
    import dfqlib

    if network == "digits_resnet8":
        return dfqlib.load_model(network), dfqlib.load_data("digits"), (1, 16, 16)
    checkpoint = data / "models" / CHECKPOINTS[network]
    if network == "cifar100_resnet20":  # an architecture that the library does not have
        sys.path.insert(0, str(ROOT / "tests"))
        from cifar100_resnet20 import MEAN, STD, Cifar100ResNet20

        teacher = dfqlib.load_checkpoint(Cifar100ResNet20(), checkpoint)
        return teacher, dfqlib.image_folder(data / "cifar100/test", MEAN, STD), (3, 32, 32)
    known = dfqlib.models.info(network)
    teacher = dfqlib.load_model(network, checkpoint=checkpoint)
    folder = dfqlib.image_folder(data / "cifar10/test", known.mean, known.std, classes=known.classes)
    return teacher, folder, known.image_shape


def real_images(network: str, data: Path) -> Any:
    """Training images for the recipes that take some, spread over the classes."""
    import torch

    import dfqlib

    known = dfqlib.models.info(network)
    folder = dfqlib.image_folder(data / "cifar10/train", known.mean, known.std, classes=known.classes)
    images = torch.cat([images for images, _ in folder])
    return images[torch.linspace(0, len(images) - 1, REAL_IMAGES).long()]


def measure(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process: accuracies, the paired difference, seconds, peak memory."""
    import torch

    import dfqlib

    torch.set_num_threads(args.threads)
    case = CASES[job.case]
    teacher, loader, shape = load(case.network, args.data)
    spec = dfqlib.QuantSpec.parse(case.bits, **dict(case.spec))
    changes = (dict(case.settings) if job.recipe == "express" else {}) | settings_of(args)
    if job.recipe == "real":
        changes["images"] = real_images(case.network, args.data)
    options: dict[str, Any] = {"budget": args.budget, "seed": job.seed, "progress": False}
    began = time.process_time()
    report = dfqlib.quantize(teacher, shape, spec, recipe=job.recipe, **options, **changes)
    cpu_seconds = time.process_time() - began
    peak = peak_gb()
    result = dfqlib.compare(report.model, teacher, loader)
    calibrated = None if report.calibrated is None else dfqlib.evaluate(report.calibrated, loader)
    return {
        **dataclasses.asdict(result),
        "calibrated_top1": calibrated,
        "seconds": report.seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gb": peak,
        "settings": report.settings,
    }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's settings that the command line changes; what is no Python literal is text."""
    changes: dict[str, Any] = {}
    for assignment in args.set:
        name, _, value = assignment.partition("=")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes


def run_apart(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """The same in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one", "--case", job.case, "--seeds", str(job.seed), "--recipe", job.recipe]
    command += ["--budget", args.budget, "--threads", str(args.threads), "--data", str(args.data)]
    command += ["--set", *args.set] if args.set else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    result: dict[str, Any] = {"seeds": [row["settings"]["seed"] for row in rows], "images": rows[0]["images"]}
    for key in ("top1", "difference", "calibrated_top1", "seconds", "cpu_seconds"):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            result[key] = statistics.mean(values)
            result[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return {**result, "teacher_top1": rows[0]["teacher_top1"], "peak_gb": max(row["peak_gb"] for row in rows)}


def record(job: Job, args: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    """Put a run into the results file; returns the summary of its case."""
    import torch

    path, name = results_file(job.recipe), case_name(job, args)
    content = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    old = content["cases"].get(name, {"runs": []})["runs"]
    rows = sorted([r for r in old if r["settings"]["seed"] != job.seed] + [row], key=lambda r: r["settings"]["seed"])
    seeds = " ".join(str(r["settings"]["seed"]) for r in rows)
    changes = f" --set {' '.join(args.set)} --variant {args.variant}" if args.set else ""
    content["cases"][name] = {
        "case": dataclasses.asdict(CASES[job.case]),
        "variant": args.variant,
        "command": f"python benchmarks/accuracy.py --recipe {job.recipe} --budget {args.budget} --case {job.case} "
        f"--seeds {seeds} --threads {args.threads} --jobs {args.jobs}{changes}",
        "recipe": job.recipe,
        "budget": args.budget,
        "device": f"CPU, {args.threads} thread{'s' * (args.threads > 1)} of {processor()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "summary": summary(rows),
        "runs": rows,
    }
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    return content["cases"][name]["summary"]


def results_file(recipe: str) -> Path:
    """Where a recipe's runs are kept."""
    return ROOT / "results" / f"accuracy_{recipe}.json"


def case_name(job: Job, args: argparse.Namespace) -> str:
    """A case under changed settings, or under another budget, is a case of its own."""
    budget = "" if args.budget == "quick" else args.budget
    return ":".join(part for part in (job.case, args.variant, budget) if part)


def measured(job: Job, args: argparse.Namespace) -> bool:
    """Whether the results file holds this run already."""
    path = results_file(job.recipe)
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    runs = cases.get(case_name(job, args), {"runs": []})["runs"]
    return any(run["settings"]["seed"] == job.seed for run in runs)


def peak_gb() -> float:
    """The most memory that this process has had; Linux's ru_maxrss would count the process that started it, too."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    """Measure what the command line asks for."""
    default = os.environ.get("DFQLIB_DATA") or ROOT.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["express"])
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the recipe")
    parser.add_argument("--variant", default="", help="name for the rows measured under --set")
    parser.add_argument("--missing", action="store_true", help="leave out what the results file holds already")
    parser.add_argument("--threads", type=int, default=1, help="of each run; more jobs finish sooner than more threads")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if bool(args.set) != bool(args.variant) and not args.one:  # a run apart needs no name
        parser.error("--set and --variant go together: rows under changed settings need a name of their own")
    jobs = [Job(r, c, s) for r in args.recipe for c in args.case for s in args.seeds]
    if args.one:
        print(json.dumps(measure(jobs[0], args), default=dataclasses.asdict))  # settings["spec"] is a QuantSpec
        return 0
    writing, failed = threading.Lock(), []

    def run(job: Job) -> None:
        try:
            row = run_apart(job, args)
        except RuntimeError as error:  # the others go on
            failed.append(job)
            print(error, file=sys.stderr, flush=True)
            return
        with writing:
            s = record(job, args, row)
            print(
                f"{job.recipe:14s} {case_name(job, args):28s} seed {job.seed}: {row['top1']:6.2f} "
                f"({row['difference']:+.2f}; mean {s['difference']:+.2f} ± {s['difference_std'] or 0:.2f}), calibrated "
                f"{row['calibrated_top1'] or float('nan'):.2f}, {row['cpu_seconds']:.0f} s, {row['peak_gb']:.2f} GB",
                flush=True,
            )

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, [job for job in jobs if not (args.missing and measured(job, args))]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
