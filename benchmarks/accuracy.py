"""How good the recipes are: paired with the teacher, last epoch, several seeds, each run in a process of its own.

    python benchmarks/accuracy.py --recipe express --seeds 0 1 2               # every case of benchmarks/cases.py
    python benchmarks/accuracy.py --case cifar10_w3a3 --seeds 0                # one of them
    python benchmarks/accuracy.py --recipe gdfq dsg --case cifar10_w4a4 --missing   # what no run has measured yet
    python benchmarks/accuracy.py --recipe calibrate --set clip=aciq --variant aciq  # with a setting of its own
    python benchmarks/accuracy.py --recipe calibrate --images build/images     # images made once for all widths
    python benchmarks/accuracy.py --curve                                      # accuracy against seconds, of express
    python benchmarks/accuracy.py --curve steps=100 images=128,steps=400       # points of your own

Needs the CIFAR folders and checkpoints described in the README under ``--data`` (default: $DFQLIB_DATA, then
../shared/data), leaving out what they are missing for; digits need nothing. Writes results/accuracy_<recipe>.json after
each run, which the README's tables are made from (``python benchmarks/tables.py``). A case that is measured again
replaces its old rows.

A point of ``--curve`` is a complete run, since a schedule that ends at its last step is not on its way to its result
before. Its rows go to results/accuracy_curve.json, and all points that are there to docs/accuracy.png.
"""

import argparse
import ast
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import curve
from cases import CASES, absent, load, real_images
from harness import DATA, ROOT, peak_gb, provenance, save

from dfqlib.training.machine import processor

CURVE = ("steps=50", "steps=100", "steps=200", "steps=400", "steps=800")
CURVE_CASES = ("cifar10_w4a4", "cifar10_w3a3", "cifar10_w4a4_all", "cifar10_w3a3_all")


@dataclass(frozen=True)
class Job:
    """One run: a recipe on a case, and the settings ("name=value") that make it a variant of that name."""

    recipe: str
    case: str
    seed: int
    changes: tuple[str, ...] = ()
    variant: str = ""


def measure(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process: accuracies, the paired difference, seconds, peak memory."""
    import torch

    import dfqlib

    torch.set_num_threads(args.threads)
    case = CASES[job.case]
    teacher, loader, shape = load(case.network, args.data)
    spec = dfqlib.QuantSpec.parse(case.bits, **dict(case.spec))
    changes = (dict(case.settings) if job.recipe == "express" else {}) | settings_of(job)
    making = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_gb": 0.0}
    if job.recipe == "real":
        changes["images"] = real_images(case.network, args.data)
    elif args.images:
        changes["images"], making = kept_images(job, args, teacher, shape)
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
        "seconds": making["seconds"] + report.seconds,
        "cpu_seconds": making["cpu_seconds"] + cpu_seconds,
        "peak_gb": max(making["peak_gb"], peak),
        "settings": report.settings,
    }


def settings_of(job: Job) -> dict[str, Any]:
    """The recipe's settings that the job changes; what is no Python literal is text."""
    changes: dict[str, Any] = {}
    for assignment in job.changes:
        name, _, value = assignment.partition("=")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes


def kept_images(job: Job, args: argparse.Namespace, teacher: Any, shape: Any) -> tuple[Any, dict[str, float]]:
    """The images of "calibrate" under this seed, which neither widths nor thresholds change, and what they cost."""
    import torch

    import dfqlib
    from dfqlib.training.files import written_whole

    path = args.images / f"{CASES[job.case].network}_{args.budget}_{job.seed}.pt"
    if not path.exists():
        began = time.process_time()
        options: dict[str, Any] = {"budget": args.budget, "seed": job.seed, "progress": False}
        report = dfqlib.quantize(teacher, shape, recipe="calibrate", clip="max", **options)
        cost = {"seconds": report.seconds, "cpu_seconds": time.process_time() - began, "peak_gb": peak_gb()}
        args.images.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            torch.save({"images": report.images, "cost": cost}, temporary)
    kept = torch.load(path, weights_only=True)
    return kept["images"], kept["cost"]


def run_apart(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """The same in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one", "--case", job.case, "--seeds", str(job.seed), "--recipe", job.recipe]
    command += ["--budget", args.budget, "--threads", str(args.threads), "--data", str(args.data)]
    command += ["--set", *job.changes] if job.changes else []
    command += ["--images", str(args.images)] if args.images else []
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
    cases, name = kept_cases(job, args), case_name(job, args)
    old = cases.get(name, {"runs": []})["runs"]
    rows = sorted([r for r in old if r["settings"]["seed"] != job.seed] + [row], key=lambda r: r["settings"]["seed"])
    cases[name] = {
        "case": dataclasses.asdict(CASES[job.case]),
        "variant": job.variant,
        "command": command_of(job, args, [r["settings"]["seed"] for r in rows]),
        "recipe": job.recipe,
        "budget": args.budget,
        **provenance(f"CPU, {args.threads} thread{'s' * (args.threads > 1)} of {processor()}"),
        "summary": summary(rows),
        "runs": rows,
    }
    save(results_file(job, args), {"cases": cases})
    return cases[name]["summary"]


def command_of(job: Job, args: argparse.Namespace, seeds: list[int]) -> str:
    """What to type to measure these rows again."""
    parts = ["python benchmarks/accuracy.py", f"--recipe {job.recipe}", f"--budget {args.budget}", f"--case {job.case}"]
    parts += [f"--seeds {' '.join(map(str, seeds))}", f"--threads {args.threads}", f"--jobs {args.jobs}"]
    if args.curve is not None:
        parts += [f"--curve {job.variant}"]
    elif job.changes:
        parts += [f"--set {' '.join(job.changes)} --variant {job.variant}"]
    return " ".join(parts + [f"--images {args.images}"] * bool(args.images))


def results_file(job: Job, args: argparse.Namespace) -> Path:
    """Where a recipe's runs are kept; those of the curve are apart, the tables do not show them."""
    return args.output / "results" / f"accuracy_{job.recipe if args.curve is None else 'curve'}.json"


def kept_cases(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """What the results file holds so far."""
    path = results_file(job, args)
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def case_name(job: Job, args: argparse.Namespace) -> str:
    """A case under changed settings, or under another budget, is a case of its own."""
    budget = "" if args.budget == "quick" else args.budget
    return ":".join(part for part in (job.case, job.variant, budget) if part)


def measured(job: Job, args: argparse.Namespace) -> bool:
    """Whether the results file holds this run already."""
    runs = kept_cases(job, args).get(case_name(job, args), {"runs": []})["runs"]
    return any(run["settings"]["seed"] == job.seed for run in runs)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; ``case`` lists those whose data is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["express"])
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--case", nargs="+", choices=CASES, metavar="CASE", help="default: all whose data is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the recipe")
    parser.add_argument("--variant", default="", help="name for the rows measured under --set")
    parser.add_argument("--curve", nargs="*", metavar="NAME=VALUE,...", help=f"default: {' '.join(CURVE)}")
    parser.add_argument("--images", type=Path, help="folder in which calibrate's images are kept for its other runs")
    parser.add_argument("--missing", action="store_true", help="leave out what the results file holds already")
    parser.add_argument("--threads", type=int, default=1, help="of each run; more jobs finish sooner than more threads")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=ROOT, help="folder of results/ and docs/")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        return args
    if bool(args.set) != bool(args.variant):
        parser.error("--set and --variant go together: rows under changed settings need a name of their own")
    if args.curve is not None and (args.recipe != ["express"] or args.set):
        parser.error("--curve is of express, and each of its points says which settings it changes: leave out the rest")
    if args.images and (args.recipe != ["calibrate"] or any(not each.startswith("clip=") for each in args.set)):
        parser.error("--images keeps what --recipe calibrate makes; of its settings only clip leaves them as they are")
    wanted = args.case or (CASES if args.curve is None else CURVE_CASES)
    lacking = {case: paths for case in wanted if (paths := absent(CASES[case].network, args.data))}
    for case, paths in lacking.items():
        print(f"{case}: left out, there is no {' and no '.join(map(str, paths))} (see --data)", file=sys.stderr)
    if lacking and args.case:
        parser.error("the cases that --case names need what is missing; the README says where it comes from")
    args.case = [case for case in wanted if case not in lacking]
    return args


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """What the command line asks for, but for what ``--missing`` leaves out."""
    variants = [(args.variant, tuple(args.set))]
    if args.curve is not None:
        variants = [(point, tuple(point.split(","))) for point in args.curve or CURVE]
    jobs = [
        Job(recipe, case, seed, changes, variant)
        for recipe in args.recipe
        for case in args.case
        for variant, changes in variants
        for seed in args.seeds
    ]
    return [job for job in jobs if not (args.missing and measured(job, args))]


def main() -> int:
    """Measure what the command line asks for."""
    args = parse()
    if args.one:
        job = Job(args.recipe[0], args.case[0], args.seeds[0], tuple(args.set))
        print(json.dumps(measure(job, args), default=dataclasses.asdict))  # settings["spec"] is a QuantSpec
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
        list(pool.map(run, jobs_of(args)))
    if args.curve is not None:
        curve.redraw(args.output)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
