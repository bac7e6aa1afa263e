"""How the cost grows: with images, with the batch, with the network, with threads.

    python benchmarks/scaling.py

Express optimizes all of its images in one batch, so their number is the batch of an iteration of synthesis; fine-tuning
costs its number of iterations times its batch, however many images the batches are drawn from. One iteration is timed
while one quantity changes, the sizes taking turns so that other programs on the machine slow all of them alike. Writes
results/scaling.json; needs no data and no checkpoint, since time depends on neither.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from harness import Job, Row, arguments, run_apart
from steps import CPU, SHAPE, Step, fine_tuning, synthesis_step, waiting

from dfqlib.models.complexity import complexity
from dfqlib.models.resnet import CifarResNet

IMAGES = (64, 128, 256, 512)
BATCHES = (16, 32, 64, 128, 256)
DEPTHS = (20, 32, 44, 56)
KINDS: dict[str, Callable[..., Step]] = {"synthesis": synthesis_step, "fine-tuning": fine_tuning}
NETWORK = "million multiply-accumulates of the network"


def seconds(steps: Mapping[float, Step], rounds: int, wait: Callable[[], None]) -> list[float]:
    """Median seconds of each iteration; they take turns."""
    for step in steps.values():
        step()
    found: dict[float, list[float]] = {size: [] for size in steps}
    for _ in range(rounds):
        for size, step in steps.items():
            wait()
            began = time.perf_counter()
            step()
            wait()
            found[size].append(time.perf_counter() - began)
    return [statistics.median(values) for values in found.values()]


def measure(job: dict[str, Any], device: torch.device, rounds: int) -> Row:
    """Seconds of one iteration by size of what changes, on one thread unless threads are what changes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, wait = partial(KINDS[job["kind"]], device=device, bf16=True), waiting(device)
    if job["quantity"] == "threads":
        cores = os.cpu_count() or 1
        sizes = sorted({*(2**power for power in range(cores.bit_length())), cores})
        return {"sizes": sizes, "seconds": [on_threads(make(), count, 3 * rounds, wait) for count in sizes]}
    if job["quantity"] == NETWORK:
        steps = {complexity(CifarResNet(depth), SHAPE)[1] / 1e6: make(depth=depth) for depth in DEPTHS}
    else:
        steps = {float(count): make(batch=count) for count in (IMAGES if job["quantity"] == "images" else BATCHES)}
    return {"sizes": list(steps), "seconds": seconds(steps, rounds, wait)}


def on_threads(step: Step, threads: int, rounds: int, wait: Callable[[], None]) -> float:
    """Seconds on so many threads."""
    torch.set_num_threads(threads)
    return seconds({threads: step}, rounds, wait)[0]


def main() -> int:
    """Measure every quantity."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=CPU)
    args = parser.parse_args()
    pairs = [("images", "synthesis"), ("batch", "fine-tuning"), *((NETWORK, kind) for kind in KINDS)]
    pairs += [("threads", kind) for kind in KINDS] if args.device == CPU else []
    settings = {"rounds": args.rounds}
    jobs: list[Job] = [({"quantity": quantity, "kind": kind}, settings) for quantity, kind in pairs]
    measuring = partial(measure, device=args.device, rounds=args.rounds)
    return run_apart(measuring, jobs, args.output / "scaling.json", args, args.device)


if __name__ == "__main__":
    sys.exit(main())
