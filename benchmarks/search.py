"""How the settings of express were chosen: each variant against the settings it would replace, paired by seed.

    python benchmarks/search.py                                # every variant below, on ResNet-20 / CIFAR-10
    python benchmarks/search.py --variant steps=800 --case cifar10_w3a3
    python benchmarks/search.py --confirm steps=800            # where nothing is chosen: ResNet-56, CIFAR-100
    python benchmarks/search.py --missing                      # go on after an interruption

No figure that is reported elsewhere may take part in a choice: the judge is CIFAR-10's lossless training images, not
its test images, and the seeds are others. The teacher has seen those images, so its lead is larger there.
Images are kept in build/search: a variant that only fine-tunes otherwise gets those of the variant it is compared with
(as recipe "real", which then does what express does, bit for bit). Rows are kept as they come, in results/search.json.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from cases import CASES, load
from harness import DATA, ROOT, provenance, save

from dfqlib.training.machine import processor

SEEDS = (100, 101)
CHOICE = ("cifar10_w3a3", "cifar10_w4a4_all")
CONFIRMATION = ("cifar10_resnet56_w4a4", "cifar100_w4a4")
VARIANTS = (
    "steps=200", "steps=800", "steps=1600", "batch=32,steps=800", "lr=1e-4", "lr=4e-4", "step_lr=0.01", "step_lr=1.0",
    "temperature=2.0", "temperature=8.0", "cutmix=0.0", "cutmix=0.5", "shift=4", "images=128", "images=512",
    "synthesis_steps=100", "synthesis_steps=400", "label_weight=0.05", "label_weight=1.0", "plateau=0.0",
    "plateau=0.03",
)  # fmt: skip
"""Settings that differ from the quick budget's, one or two at a time."""
PATH = ROOT / "results" / "search.json"


def judge(network: str, data: Path) -> Any:
    """Images and labels that decide: training images; where nothing is chosen and there are few, the test's."""
    import dfqlib

    if not network.startswith("cifar10_"):
        return load(network, data)[1]
    known = dfqlib.models.info(network)
    return dfqlib.image_folder(data / "cifar10/train", known.mean, known.std, classes=known.classes)


def changes_of(variant: str) -> dict[str, Any]:
    """The settings that a variant changes."""
    pairs = (assignment.partition("=") for assignment in variant.split(",") if assignment)
    return {name: json.loads(value) for name, _, value in pairs}


def measure(case_name: str, variant: str, seed: int, data: Path) -> dict[str, Any]:
    """One run: its difference from the teacher in points, and its seconds of processor time."""
    import torch

    import dfqlib

    torch.set_num_threads(1)
    case, changes = CASES[case_name], changes_of(variant)
    teacher, _, shape = load(case.network, data)
    spec = dfqlib.QuantSpec.parse(case.bits, **dict(case.spec))
    images, making = synthesized(case.network, teacher, shape, seed, changes)
    began = time.process_time()
    tuning = {name: value for name, value in changes.items() if name in tuning_settings()}
    tuning |= {"images": images, "calibration_images": len(images)}
    report = dfqlib.quantize(teacher, shape, spec, recipe="real", seed=seed, progress=False, **tuning)
    seconds = making + time.process_time() - began
    result = dfqlib.compare(report.model, teacher, judge(case.network, data))
    return {
        "case": case_name,
        "variant": variant,
        "seed": seed,
        "difference": result.difference,
        "cpu_seconds": seconds,
    }


def tuning_settings() -> set[str]:
    """Names of the settings that say nothing about how images are made."""
    from dfqlib.recipes import real

    return set(vars(real.Settings())) - {"images", "calibration_images"}


def synthesized(network: str, teacher: Any, shape: Any, seed: int, changes: dict[str, Any]) -> tuple[Any, float]:
    """The images of these settings, made once, and the processor seconds that they took."""
    import torch

    import dfqlib
    from dfqlib.training.files import written_whole

    making = {k: v for k, v in changes.items() if k not in tuning_settings() or k in ("shift", "flip", "bf16")}
    name = "_".join([network, str(seed), *(f"{key}={value}" for key, value in sorted(making.items()))])
    path = ROOT / "build" / "search" / f"{name}.pt"
    if not path.exists():
        began = time.process_time()
        report = dfqlib.quantize(teacher, shape, recipe="express", steps=0, seed=seed, progress=False, **making)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            torch.save({"images": report.images, "seconds": time.process_time() - began}, temporary)
    kept = torch.load(path, weights_only=True)
    return kept["images"], kept["seconds"]


def gains(rows: list[dict[str, Any]], case: str, variant: str) -> list[float]:
    """Points that a variant gains over the quick budget, one for each seed that both have run."""
    of = {(row["variant"], row["seed"]): row["difference"] for row in rows if row["case"] == case}
    seeds = [seed for name, seed in of if name == variant and ("", seed) in of]
    return [of[variant, seed] - of["", seed] for seed in seeds]


def main() -> int:
    """Run what is asked for, two at a time, and keep each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), metavar="NAME=VALUE,...")
    parser.add_argument("--confirm", nargs="+", default=[], metavar="NAME=VALUE,...", help="where nothing is chosen")
    parser.add_argument("--case", nargs="+", choices=CASES, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--missing", action="store_true", help="leave out what the results file holds already")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    cases = args.case or (CONFIRMATION if args.confirm else CHOICE)
    variants = dict.fromkeys(["", *(args.confirm or args.variant)])
    rows: list[dict[str, Any]] = json.loads(PATH.read_text())["runs"] if PATH.exists() else []
    jobs = [(case, variant, seed) for case in cases for variant in variants for seed in args.seeds]
    if args.missing:
        there = {(row["case"], row["variant"], row["seed"]) for row in rows}
        jobs = [job for job in jobs if job not in there]
    with ProcessPoolExecutor(args.jobs, max_tasks_per_child=1) as pool:
        for row in pool.map(measure, *zip(*jobs, strict=True), [args.data] * len(jobs)) if jobs else []:
            rows = [r for r in rows if any(r[key] != row[key] for key in ("case", "variant", "seed"))] + [row]
            content = {"command": "python benchmarks/search.py", **provenance(f"CPU, 1 thread of {processor()}")}
            save(PATH, {**content, "judge": "the lossless training images of CIFAR-10", "runs": rows})
            gain = gains(rows, row["case"], row["variant"])
            mean = f"{statistics.mean(gain):+.2f}" if gain else ""
            print(f"{row['case']:22s} {row['variant']:22s} {row['difference']:+.2f}  gain {mean}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
