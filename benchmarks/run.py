"""Run the benchmarks, one after another, and write the README's tables from what they find: ``make bench``.

    python benchmarks/run.py                   # all of them: hours on two cores
    python benchmarks/run.py speed tables      # some of them: minutes
    python benchmarks/run.py --missing         # go on where an interrupted run stopped measuring accuracies
    python benchmarks/run.py --short           # only see whether each works: minutes; what it measures means little

The short form writes to build/bench and leaves results/, docs/ and the README as they are.

What needs the folders of real images or the public checkpoints, described in the README and looked for where
DFQLIB_DATA says (default: ../shared/data), is left out where there are none.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cases import absent
from harness import DATA, ROOT


@dataclass(frozen=True)
class Benchmark:
    """A program of this folder with its arguments, and those of its short form, which a few do without.

    Attributes:
        arguments: of the full form; the accuracies' seconds are those of two threads, one run at a time.
        short: of the short form; None for no such form.
        keeps: knows ``--missing``.
        network: whose checkpoint and test images it cannot do without.
    """

    arguments: str
    short: str | None = None
    keeps: bool = False
    network: str = ""


BENCHMARKS = {
    "speed": Benchmark("speed.py", "speed.py --threads 1 --rounds 1 --seconds 0.05"),
    "scaling": Benchmark("scaling.py", "scaling.py --rounds 1"),
    "accuracy": Benchmark(
        "accuracy.py --recipe express --seeds 0 1 2 3 4 --threads 2 --jobs 1",
        "accuracy.py --case digits_w2a2_short --seeds 0 --jobs 1",
        keeps=True,
    ),
    "curve": Benchmark(
        "accuracy.py --curve --seeds 0 1 2 --threads 2 --jobs 1",
        "accuracy.py --curve steps=20 steps=40 --case digits_w2a2_short --seeds 0 --jobs 1",
        keeps=True,
    ),
    "deploy": Benchmark("deploy.py", network="cifar10_resnet20"),
    "overview": Benchmark("overview.py", network="cifar10_resnet20"),
    "tables": Benchmark("tables.py"),
}


def command(benchmark: Benchmark, *, short: bool, missing: bool) -> list[str] | None:
    """What to start; None where there is no short form."""
    arguments = benchmark.short if short else benchmark.arguments
    if arguments is None:
        return None
    program, *rest = arguments.split()
    rest += ["--output", str(ROOT / "build" / "bench")] if short else []
    rest += ["--missing"] if missing and benchmark.keeps else []
    return [sys.executable, str(ROOT / "benchmarks" / program), *rest]


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; one that fails does not keep the others from running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--short", action="store_true", help="only see whether they work")
    parser.add_argument("--missing", action="store_true", help="leave out accuracies that results/ has already")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    failed = []
    for name in args.names or BENCHMARKS:
        started = command(BENCHMARKS[name], short=args.short, missing=args.missing)
        lacking = absent(BENCHMARKS[name].network, DATA)
        if started is None:
            print(f"{name}: left out, it has no short form", flush=True)
        elif lacking:
            print(f"{name}: left out, there is no {' and no '.join(map(str, lacking))} (see DFQLIB_DATA)", flush=True)
        else:
            print(f"{name}: {' '.join(['python', str(Path(started[1]).relative_to(ROOT)), *started[2:]])}", flush=True)
            if subprocess.run(started, check=False).returncode:
                failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
