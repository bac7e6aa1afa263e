"""How accurate the recipes are: each run paired with its teacher on the same images, last iteration, several seeds.

    python benchmarks/accuracy.py                                   # express on every case of benchmarks/cases.py
    python benchmarks/accuracy.py --recipe gdfq dsg --case cifar10_w4a4 --seeds 0 1 2
    python benchmarks/accuracy.py --recipe calibrate --set clip=mse clip=aciq      # two variants
    python benchmarks/accuracy.py --file curve --case cifar10_w3a3 --set steps=50 steps=100 images=512,steps=1200
    python benchmarks/accuracy.py --file search --judge train --seeds 100 101 --set steps=800 lr=4e-4

Cases whose CIFAR folders and checkpoints are not under ``--data`` (default: $DFQLIB_DATA, then ../shared/data) are left
out; digits need nothing. Writes results/accuracy_<recipe or --file>.json.

Settings are chosen with ``--judge train`` and seeds that no table shows, never on the test images. The teacher has seen
the training images, so its lead is larger there. A point of the curve is a complete run: a learning-rate schedule that
ends at its last iteration does not pass through the result of a shorter one.
"""

import argparse
import ast
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from cases import CASES, load, missing, real_images
from harness import Job, Row, arguments, peak_gb, run_apart

from dfqlib import recipes


def measure(job: dict[str, Any], data: Path) -> Row:
    """One run: accuracies, the paired difference, seconds, peak memory."""
    import torch

    import dfqlib

    torch.set_num_threads(job["threads"])
    case, changes = CASES[job["case"]], changes_of(job["variant"])
    teacher, loader, shape = load(case.network, data, job["judge"])
    if job["recipe"] == "real":
        changes["images"] = real_images(case.network, data)
    chosen = {name: job[name] for name in ("recipe", "budget", "seed")}
    began = time.process_time()
    report = dfqlib.quantize(teacher, shape, case.spec, progress=False, **chosen, **changes)
    cpu_seconds = time.process_time() - began
    peak = peak_gb()
    return {
        **dataclasses.asdict(dfqlib.compare(report.model, teacher, loader)),
        "calibrated_top1": None if report.calibrated is None else dfqlib.evaluate(report.calibrated, loader),
        "seconds": report.seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gb": peak,
        "settings": report.settings,
    }


def changes_of(variant: str) -> dict[str, Any]:
    """The settings that a variant such as "images=512,clip=mse" changes; what is no Python literal is text."""
    changes: dict[str, Any] = {}
    for assignment in filter(None, variant.split(",")):
        name, _, value = assignment.partition("=")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes


def settings_of(recipe: str, budget: str, case: str, variant: str) -> dict[str, Any]:
    """What such a run is made with today; a row that was made with something else is measured again."""
    _, settings = recipes.find(recipe, "quantize", budget, changes_of(variant))
    known = {"spec": dataclasses.asdict(CASES[case].spec), **dataclasses.asdict(settings)}
    return {name: value for name, value in known.items() if (recipe, name) != ("real", "images")}  # given by measure


def cases_of(args: argparse.Namespace) -> list[str]:
    """The cases that the command line names and whose data is there."""
    lacking: dict[str, list[str]] = {}
    for case in args.case or CASES:
        lacking.setdefault(missing(CASES[case].network, args.data, args.judge), []).append(case)
    there = lacking.pop("", [])
    for files, cases in lacking.items():
        print(f"left out, there is {files} (see --data): {', '.join(cases)}", file=sys.stderr)
    return there


def jobs_of(args: argparse.Namespace, recipe: str) -> list[Job]:
    """The runs of a recipe that the command line names."""
    jobs = []
    for case in args.case:
        for variant in args.set:
            for seed in args.seeds:
                identity = {"recipe": recipe, "budget": args.budget, "case": case, "variant": variant, "seed": seed}
                identity |= {"judge": args.judge, "threads": args.threads}
                jobs.append((identity, settings_of(recipe, args.budget, case, variant)))
    return jobs


def main(words: list[str] | None = None) -> int:
    """Measure what the command line names; returns the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("--recipe", nargs="+", default=["express"])
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--case", nargs="+", choices=CASES, metavar="CASE", help="default: all whose data is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[""], metavar="NAME=VALUE,...", help="one variant each")
    parser.add_argument("--judge", choices=("test", "train"), default="test", help="images that accuracies are of")
    parser.add_argument("--file", metavar="NAME", help="results/accuracy_NAME.json (default: the recipe)")
    args = parser.parse_args(words)
    args.case = cases_of(args)
    measuring = partial(measure, data=args.data)
    return max(
        run_apart(measuring, jobs_of(args, recipe), args.output / f"accuracy_{args.file or recipe}.json", args)
        for recipe in args.recipe
    )


if __name__ == "__main__":
    sys.exit(main())
