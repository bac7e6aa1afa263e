"""Draw docs/overview.png for the README: images a network was made to draw, and what its low-bit version reaches.

python benchmarks/overview.py        # needs the CIFAR-10 checkpoint under --data, and results/accuracy_express.json
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from cases import load
from harness import DATA, ROOT

import dfqlib
from dfqlib import plots

CASES = {"cifar10_w4a4": "ResNet-20\nW4A4", "cifar10_w3a3": "ResNet-20\nW3A3", "digits_w2a2": "digits\nW2A2"}
BARS = {"teacher_top1": "FP32", "calibrated_top1": "quantized, ranges only", "top1": "fine-tuned on its own images"}


def main() -> None:
    """Synthesize, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    teacher, _, shape = load("cifar10_resnet20", args.data)
    known = dfqlib.models.info("cifar10_resnet20")
    images = dfqlib.quantize(teacher, shape, steps=0, progress=False).images
    cases = json.loads((ROOT / "results" / "accuracy_express.json").read_text())["cases"]

    plots.use_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=(1.15, 1))
    grid = images[:50].view(5, 10, *shape) * torch.tensor(known.std).view(3, 1, 1) + torch.tensor(known.mean).view(
        3, 1, 1
    )
    picture = grid.permute(0, 3, 1, 4, 2).reshape(5 * shape[1], 10 * shape[2], 3)
    left.imshow(picture.clamp(0, 1))
    left.set_xticks([shape[2] * (i + 0.5) for i in range(10)], known.classes, rotation=40, ha="right")
    left.set_yticks([])
    left.grid(False)
    left.set_title("What a CIFAR-10 network remembers: images out of noise")
    for offset, (key, label) in enumerate(BARS.items()):
        heights = [cases[name]["summary"][key] for name in CASES]
        places = [place + 0.27 * (offset - 1) for place in range(len(CASES))]
        bars = right.bar(
            places, heights, 0.25, label=label, color=plots.PALETTE[offset + 1], hatch=plots.HATCHES[offset]
        )
        right.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    right.set_xticks(range(len(CASES)), CASES.values())
    right.set_ylabel("top-1 on test images, %")
    right.set_ylim(0, 118)
    right.set_title("Fine-tuning on them brings low-bit networks back")
    right.legend(loc="upper center", ncols=3, fontsize=7.5, frameon=False)
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "overview.png").write_bytes(plots.png(figure))


if __name__ == "__main__":
    main()
