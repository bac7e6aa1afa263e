"""How good the recipes are: paired with the teacher, last epoch, several seeds, each run in a process of its own.

    python benchmarks/accuracy.py --recipe express --seeds 0 1 2     # every case of the list below
    python benchmarks/accuracy.py --case cifar10_w3a3 --seeds 0      # one of them

Needs the CIFAR folders and checkpoints described in the README under ``--data`` (default: $DFQLIB_DATA, then
../shared/data); digits need nothing. Writes results/accuracy_<recipe>.json, which the README's table is made from
(``python benchmarks/tables.py``). A case that is measured again replaces its old rows.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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


def measure(case: Case, recipe: str, budget: str, seed: int, threads: int, data: Path) -> dict[str, Any]:
    """One run in this process: accuracies, the paired difference, seconds, peak memory."""
    import torch

    import dfqlib

    torch.set_num_threads(threads)
    teacher, loader, shape = load(case.network, data)
    spec = dfqlib.QuantSpec.parse(case.bits, **dict(case.spec))
    changes = dict(case.settings) if recipe == "express" else {}
    report = dfqlib.quantize(teacher, shape, spec, recipe=recipe, budget=budget, seed=seed, progress=False, **changes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)
    result = dfqlib.compare(report.model, teacher, loader)
    calibrated = None if report.calibrated is None else dfqlib.evaluate(report.calibrated, loader)
    return {
        **dataclasses.asdict(result),
        "calibrated_top1": calibrated,
        "seconds": report.seconds,
        "peak_gb": peak,
        "settings": report.settings,
    }


def run_apart(name: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The same in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one", name, "--seeds", str(seed), "--recipe", args.recipe]
    command += ["--budget", args.budget, "--threads", str(args.threads), "--data", str(args.data)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    result: dict[str, Any] = {"seeds": [row["settings"]["seed"] for row in rows], "images": rows[0]["images"]}
    for key in ("top1", "difference", "calibrated_top1", "seconds"):
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            result[key] = statistics.mean(values)
            result[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return {**result, "teacher_top1": rows[0]["teacher_top1"], "peak_gb": max(row["peak_gb"] for row in rows)}


def record(path: Path, name: str, case: Case, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Put a case's rows into the results file."""
    import torch

    content = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    content["cases"][name] = {
        "case": dataclasses.asdict(case),
        "command": f"python benchmarks/accuracy.py --recipe {args.recipe} --budget {args.budget} --case {name} "
        f"--seeds {' '.join(map(str, args.seeds))} --threads {args.threads} --jobs {args.jobs}",
        "recipe": args.recipe,
        "budget": args.budget,
        "device": f"CPU, {args.threads} thread{'s' * (args.threads > 1)} of {processor()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "summary": summary(rows),
        "runs": rows,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure what the command line asks for."""
    default = os.environ.get("DFQLIB_DATA") or ROOT.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="express")
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each run; more jobs finish sooner than more threads")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        row = measure(CASES[args.one], args.recipe, args.budget, args.seeds[0], args.threads, args.data)
        print(json.dumps(row, default=dataclasses.asdict))  # settings["spec"] is a QuantSpec
        return
    path = ROOT / "results" / f"accuracy_{args.recipe}.json"
    for name in args.case:
        with ThreadPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(partial(run_apart, name, args), args.seeds))
        record(path, name, CASES[name], args, rows)
        s = summary(rows)
        print(
            f"{name:24s} {s['top1']:6.2f} ({s['difference']:+.2f} ± {s['difference_std'] or 0:.2f}), calibrated only "
            f"{s.get('calibrated_top1', float('nan')):.2f}, {s['seconds']:.0f} s, {s['peak_gb']:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
