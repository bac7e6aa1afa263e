"""What leaves as integers: agreement, accuracy, size and latency of exported files, each run in a fresh process.

    python benchmarks/deploy.py          # ResNet-20 / CIFAR-10: W8A8 and W3A3 calibrated only, W4A4 fine-tuned, 3 seeds

Accuracies are those of ONNX Runtime's default session, of its exact kernels (``verify_export`` has both), and of a
model of the kernels of processors without VNNI, where pairs of products saturate (tests/saturating.py). The three must
agree.

Latencies are medians of processor time on one thread, engines taking turns, in a process that has done nothing else:
after fine-tuning PyTorch keeps memory that a program which only runs the network would ask for at each batch, and is
up to twice as fast. Writes results/export.json, from which
``python benchmarks/tables.py`` makes a table where the README has ``<!-- results: export -->``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cases import load
from harness import DATA, ROOT

from dfqlib.training.machine import processor

RUNS = [(bits, seed, steps) for bits, steps in (("w8a8", 0), ("w3a3", 0), ("w4a4", None)) for seed in (0, 1, 2)]
"""(bits, seed, fine-tuning steps; None for the budget's)."""
INTEGER_SHARE = 0.2


def measure(bits: str, seed: int, steps: int | None, data: Path) -> dict[str, Any]:
    """Quantize, export both containers, and compare each with the integer simulation."""
    import torch

    import dfqlib

    sys.path.insert(0, str(ROOT / "tests"))
    import saturating

    torch.set_num_threads(1)
    teacher, loader, shape = load("cifar10_resnet20", data)
    images, labels = dfqlib.data.images_and_labels(loader)
    noise = torch.randn(2000, *shape, generator=torch.Generator().manual_seed(0))
    settings = {} if steps is None else {"steps": steps}
    report = dfqlib.quantize(
        teacher, shape, bits, seed=seed, progress=False, integer_share=0.0 if steps == 0 else INTEGER_SHARE, **settings
    )
    row: dict[str, Any] = {"bits": bits, "seed": seed, "fine_tuned": steps != 0}
    row["fp32_top1"] = dfqlib.evaluate(teacher, loader)
    row["channels_in_7_bits"] = sum(dfqlib.integer.narrowed(report.model).values())
    for container in ("int8", "int4") if bits != "w8a8" else ("int8",):
        with tempfile.TemporaryDirectory() as folder:
            saved = dfqlib.save_quantized(report, Path(folder) / "q.pt", arch="cifar10_resnet20")
            path = dfqlib.export_onnx(report, Path(folder) / "model.onnx", shape, container=container)
            check = dfqlib.verify_export(report, path, images, labels)
            random = dfqlib.verify_export(report, path, noise)
            saturable = sum(saturating.saturable(path).values())
            if "saturating_top1" not in row:  # the other container has the same codes
                chosen = torch.from_numpy(saturating.run(path, images)).argmax(1)
                row["saturating_top1"] = 100 * float((chosen == labels).float().mean())
            milliseconds = _in_fresh_process("--times", str(path), str(saved), data=data)
        row[container] = {
            "agreement_test_images": check.agreement,
            "agreement_random_images": random.agreement,
            "largest_logit_difference": max(check.largest_difference, random.largest_difference),
            "exact_agreement": min(check.exact_agreement, random.exact_agreement),
            "exact_logit_difference": max(check.exact_largest_difference, random.exact_largest_difference),
            "model_agreement": check.model_agreement,
            "saturable_channels": saturable,
            "file_top1": check.file_top1,
            "exact_top1": check.exact_top1,
            "model_top1": check.model_top1,
            "file_bytes": check.file_bytes,
            "fp32_bytes": check.float_bytes,
            "all_integer": check.all_integer,
            "qlinearconv": check.operations.get("QLinearConv", 0),
            "milliseconds": milliseconds,
        }
    return row


def times(path: Path, saved: Path, data: Path) -> dict[str, dict[int, float]]:
    """Milliseconds of a file and of the network it came from."""
    import torch

    import dfqlib

    torch.set_num_threads(1)
    _, loader, _ = load("cifar10_resnet20", data)
    images, _ = next(iter(loader))
    return dfqlib.verify_export(dfqlib.load_quantized(saved), path, images[:64]).milliseconds


def _in_fresh_process(*arguments: str, data: Path) -> Any:
    """What this script prints when it is started with ``arguments``."""
    command = [sys.executable, __file__, *arguments, "--data", str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every run and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--times", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.times:
        print(json.dumps(times(*args.times, data=args.data)))
        return
    if args.one:
        print(json.dumps(measure(*json.loads(args.one), data=args.data)))
        return
    rows = []
    for run in RUNS:
        rows.append(_in_fresh_process("--one", json.dumps(run), data=args.data))
        print(json.dumps(rows[-1]), flush=True)
    content = {
        "command": "python benchmarks/deploy.py",
        "network": "ResNet-20, CIFAR-10",
        "recipe": "express",
        "budget": f"quick, integer_share={INTEGER_SHARE} for the fine-tuned runs",
        "device": f"CPU, 1 thread of {processor()}",
        "versions": {
            "python": platform.python_version(), **{name: version(name) for name in ("torch", "onnx", "onnxruntime")}
        },
        "date": time.strftime("%Y-%m-%d"),
        "runs": rows,
    }  # fmt: skip
    path = ROOT / "results" / "export.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
