"""Run the benchmarks, one after another, then draw the figures and write the tables: ``make bench``.

    python benchmarks/run.py                   # all of them: many hours on two cores; started again, it goes on
    python benchmarks/run.py speed tables      # some of them
    python benchmarks/run.py --short           # only see whether each works: minutes; what it measures means little

The short form writes to build/bench and leaves results/, docs/ and the README as they are. What needs folders of real
images or public checkpoints is left out where there are none.
"""

import argparse
import subprocess
import sys

from harness import ROOT
from tables import DIGITS, MATRIX, RECIPES

OUTPUT = "build/bench"
COMPARED = " ".join([*MATRIX, DIGITS])
CLIPPING = " ".join(variant for recipe, variant in RECIPES if recipe == "calibrate")
TRAINED = " ".join(recipe for recipe, variant in RECIPES if not variant and recipe != "express")
LONG = "cifar10_w3a3 cifar10_w4a4_all cifar10_w3a3_all"
PROGRAMS = {
    "speed": ["speed.py"],
    "scaling": ["scaling.py"],
    "accuracy": [
        "accuracy.py",
        "accuracy.py --case cifar10_w4a4 --seeds 3 4",
        "accuracy.py --case digits_w2a2 --set images=128,synthesis_steps=150,steps=200",
        f"accuracy.py --budget published --case {LONG} --seeds 0 1 2 3 4",
        "accuracy.py --budget published --case cifar10_w2a2 cifar10_resnet56_w4a4 cifar100_w4a4",
        "accuracy.py --case cifar10_w2a2 --set images=1024,steps=6000",
        "accuracy.py --case cifar10_w4a4 --seeds 0 --threads 2",
        "accuracy.py --budget published --case cifar10_w4a4_all --seeds 0 --threads 2",
        "accuracy.py --budget published --case cifar10_w3a3 --seeds 0 --threads 2 --set compiled=True",
        f"accuracy.py --recipe {TRAINED} --case {COMPARED}",
        "accuracy.py --recipe real --budget published --case cifar10_w2a2",
        f"accuracy.py --recipe calibrate --case {COMPARED} --set {CLIPPING}",
        "accuracy.py --recipe dfqf --case cifar10_w4a4 --set warm_up_epochs=16,batch=256",
    ],
    "curve": [
        "accuracy.py --file curve --case cifar10_w3a3 "
        "--set steps=50 steps=100 steps=200 steps=400 steps=800 images=512,steps=1200"
    ],
    "deploy": ["deploy.py"],
    "lessons": ["lessons.py"],
    "figures": ["figures.py"],
    "tables": ["tables.py"],
}
"""Name -> command lines. How the settings of express were searched is in results/accuracy_search.json."""
SHORT = {
    "speed": [f"speed.py --only 1 --rounds 1 --seconds 0.05 --output {OUTPUT}"],
    "scaling": [f"scaling.py --rounds 1 --output {OUTPUT}"],
    "accuracy": [f"accuracy.py --case digits_w2a2 --seeds 0 --set images=64,steps=20 --output {OUTPUT}"],
    "curve": [f"accuracy.py --file curve --case digits_w2a2 --seeds 0 --set steps=20 steps=40 --output {OUTPUT}"],
    "figures": [f"figures.py --only accuracy speed scaling --results {OUTPUT} --output {OUTPUT}"],
}


def main(words: list[str] | None = None) -> int:
    """Run what the command line names; one that fails does not keep the others from running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROGRAMS)}; default: all")
    parser.add_argument("--short", action="store_true", help="only see whether they work")
    args = parser.parse_args(words)
    if unknown := [name for name in args.names if name not in PROGRAMS]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
    programs = SHORT if args.short else PROGRAMS
    failed = []
    for name in [name for name in args.names or PROGRAMS if name in programs]:
        for line in programs[name]:
            print(f"{name}: python benchmarks/{line}", flush=True)
            program, *rest = line.split()
            if subprocess.run([sys.executable, f"benchmarks/{program}", *rest], cwd=ROOT, check=False).returncode:
                failed.append(line)
    for line in failed:
        print(f"failed: python benchmarks/{line}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
