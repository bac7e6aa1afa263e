"""What leaves as integers: agreement, accuracy, size and latency of exported files.

    python benchmarks/deploy.py          # ResNet-20 / CIFAR-10: W8A8 and W3A3 calibrated only, W4A4 fine-tuned, 3 seeds

Accuracies are those of ONNX Runtime's default session, of its exact kernels (``verify_export`` has both), and of a
model of the kernels of processors without VNNI, where pairs of products saturate (tests/saturating.py). The three must
agree.

Latencies are medians of processor time on one thread, engines taking turns, in a process that has done nothing else:
after fine-tuning PyTorch keeps memory that a program which only runs the network would request at each batch, and is
up to twice as fast. Writes results/export.json.
"""

import dataclasses
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from cases import load, missing
from harness import ROOT, Job, Row, apart, arguments, run_apart

from dfqlib import QuantSpec

NETWORK = "cifar10_resnet20"
SETTINGS: dict[bool, dict[str, Any]] = {False: {"steps": 0, "integer_share": 0.0}, True: {"integer_share": 0.2}}
"""Of networks that are calibrated only, and of fine-tuned ones: a fifth of their iterations is computed in integers."""


def jobs_of(seeds: list[int]) -> list[Job]:
    """Three bit widths under each seed."""
    jobs: list[Job] = []
    for bits, fine_tuned in (("w8a8", False), ("w3a3", False), ("w4a4", True)):
        settings = SETTINGS[fine_tuned] | {"spec": dataclasses.asdict(QuantSpec.parse(bits))}
        jobs += [({"bits": bits, "fine_tuned": fine_tuned, "seed": seed}, settings) for seed in seeds]
    return jobs


def measure(job: dict[str, Any], data: Path) -> Row:
    """Quantize, export each container, and compare it with the integer simulation."""
    import torch

    import dfqlib

    sys.path.insert(0, str(ROOT / "tests"))
    import saturating

    torch.set_num_threads(1)
    teacher, loader, shape = load(NETWORK, data)
    images, labels = dfqlib.data.images_and_labels(loader)
    noise = torch.randn(2000, *shape, generator=torch.Generator().manual_seed(0))
    settings = SETTINGS[job["fine_tuned"]]
    report = dfqlib.quantize(teacher, shape, job["bits"], seed=job["seed"], progress=False, **settings)
    row: Row = {
        "fp32_top1": dfqlib.evaluate(teacher, loader),
        "channels_in_7_bits": sum(dfqlib.integer.narrowed(report.model).values()),
    }
    for container in ("int8", "int4") if job["bits"] != "w8a8" else ("int8",):
        with tempfile.TemporaryDirectory() as folder:
            saved = dfqlib.save_quantized(report, Path(folder) / "q.pt", arch=NETWORK)
            path = dfqlib.export_onnx(report, Path(folder) / "model.onnx", shape, container=container)
            check = dfqlib.verify_export(report, path, images, labels)
            random = dfqlib.verify_export(report, path, noise)
            saturable = sum(saturating.saturable(path).values())
            if "saturating_top1" not in row:  # the other container has the same integer values
                chosen = torch.from_numpy(saturating.run(path, images)).argmax(1)
                row["saturating_top1"] = 100 * float((chosen == labels).float().mean())
            milliseconds = apart(times, path, saved, data)
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
    _, loader, _ = load(NETWORK, data)
    images, _ = next(iter(loader))
    return dfqlib.verify_export(dfqlib.load_quantized(saved), path, images[:64]).milliseconds


def main() -> int:
    """Measure every run."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if lacking := missing(NETWORK, args.data):
        print(f"left out, there is {lacking} (see --data)", file=sys.stderr)
        return 0
    return run_apart(partial(measure, data=args.data), jobs_of(args.seeds), args.output / "export.json", args)


if __name__ == "__main__":
    sys.exit(main())
