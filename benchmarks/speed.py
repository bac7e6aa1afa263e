"""What an iteration costs: images per second and peak memory of each variant of its computation.

    python benchmarks/speed.py                  # ResNet-20 at 32x32, batches of 64, one thread and two
    python benchmarks/speed.py --only 1 --rounds 5
    python benchmarks/speed.py --device cuda

The variants of one table take turns, round after round, and a figure is the median of its rounds: other programs on
the machine slow all of them alike, so ratios hold where times do not. Peak memory is measured apart, a process for each
variant. Writes results/speed.json; needs no data and no checkpoint, since time depends on neither.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from harness import Job, Row, arguments, peak_gb, run_apart
from steps import BATCH, Step, fine_tuning, float_training, generator_step, synthesis_step, waiting

FLOAT, NAIVE, OURS, FAST = "FP32 training", "W4A4, naive straight-through", "W4A4", "W4A4, bf16, compiled"
TABLES: dict[str, dict[str, Callable[..., Step]]] = {
    "fine-tuning": {
        FLOAT: float_training,
        "FP32 training, bf16": partial(float_training, bf16=True),
        "FP32 training, bf16, compiled": partial(float_training, bf16=True, compiled=True),
        NAIVE: partial(fine_tuning, naive=True),
        OURS: fine_tuning,
        "W4A4, compiled": partial(fine_tuning, compiled=True),
        "W4A4, bf16": partial(fine_tuning, bf16=True),
        FAST: partial(fine_tuning, bf16=True, compiled=True),
        "W4A4, bf16, with the teacher's forward pass": partial(fine_tuning, bf16=True, teacher=True),
    },
    "synthesis": {
        "contiguous": partial(synthesis_step, contiguous=True),
        "channels last": synthesis_step,
        "channels last, bf16": partial(synthesis_step, bf16=True),
    },
    "generator": {"FP32": generator_step, "bf16": partial(generator_step, bf16=True)},
}
"""Table -> variant -> what makes its iteration; the first variant of a table is what the others are compared with."""


def rates(
    variants: Mapping[str, Callable[..., Step]], device: torch.device, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Images per second of each variant in each round, after a warm-up."""
    torch.manual_seed(0)
    wait = waiting(device)
    steps = {name: make(device=device) for name, make in variants.items()}
    for step in steps.values():
        step()
        step()
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in steps.items():
            wait()
            count, began = 0, time.perf_counter()
            while count < 2 or time.perf_counter() - began < seconds:
                step()
                count += 1
            wait()
            found[name].append(BATCH * count / (time.perf_counter() - began))
    return found


def against(row: Row, variant: str, base: str) -> float:
    """How many times as fast as ``base`` a variant is: the median of the rounds' ratios."""
    pairs = zip(row["ratios"][variant], row["ratios"][base], strict=True)
    return statistics.median(ratio / other for ratio, other in pairs)


def measure(job: dict[str, Any], device: torch.device, rounds: int, seconds: float) -> Row:
    """The rates of a table's variants on so many threads, or the peak memory of one variant on one thread."""
    torch.set_num_threads(job.get("threads", 1))
    if "threads" in job:
        found = rates(TABLES[job["table"]], device, rounds, seconds)
        first = next(iter(found.values()))
        return {
            "images_per_second": {name: statistics.median(values) for name, values in found.items()},
            "ratios": {name: [a / b for a, b in zip(values, first, strict=True)] for name, values in found.items()},
        }
    step = TABLES[job["table"]][job["variant"]](device=device)
    for _ in range(4):
        step()
    return {"peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else peak_gb()}


def main() -> int:
    """Measure every table."""
    parser = arguments(__doc__)
    cores = sorted({1, min(2, os.cpu_count() or 1)})
    parser.add_argument("--only", type=int, nargs="+", default=cores, metavar="N", help="numbers of threads")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each variant in each round")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch finds no CUDA device here")
    on = {"device": str(args.device)}
    settings = {"rounds": args.rounds, "seconds": args.seconds}
    jobs: list[Job] = [({**on, "table": table, "threads": count}, settings) for count in args.only for table in TABLES]
    jobs += [({**on, "table": table, "variant": name}, {}) for table, variants in TABLES.items() for name in variants]
    measuring = partial(measure, device=args.device, **settings)
    return run_apart(measuring, jobs, args.output / "speed.json", args, args.device)


if __name__ == "__main__":
    sys.exit(main())
