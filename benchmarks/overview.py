"""Draw docs/overview.png for the README: images a network was made to draw, and what its low-bit versions reach.

python benchmarks/overview.py        # needs the CIFAR-10 checkpoint under --data, and results/accuracy_express.json
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from cases import load
from harness import DATA, ROOT, save_picture

import dfqlib
from dfqlib.lessons import plots

NETWORK = "cifar10_resnet20"
CASES = {
    "cifar10_w4a4": "ResNet-20\nW4A4, quick",
    "cifar10_w3a3:published": "ResNet-20\nW3A3, published",
    "cifar10_w2a2_long": "ResNet-20\nW2A2, 6,000 steps",
    "digits_w2a2": "digits\nW2A2, quick",
}
BARS = {"teacher_top1": "FP32", "calibrated_top1": "quantized, ranges only", "top1": "fine-tuned on its own images"}
ROWS = 5


def main() -> None:
    """Synthesize, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    teacher, _, shape = load(NETWORK, args.data)
    known = dfqlib.models.info(NETWORK)
    images = dfqlib.quantize(teacher, shape, steps=0, progress=False).images
    results = json.loads((ROOT / "results" / "accuracy_express.json").read_text())["cases"]
    summaries = [results[name]["summary"] for name in CASES]

    plots.use_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6))
    columns = len(known.classes)
    plots.image_grid(left, images[: ROWS * columns], known.mean, known.std, columns)
    side = shape[2] + 1  # a line between two images
    left.set_axis_on()
    left.set_xticks(
        [side * (index + 0.5) for index in range(columns)], known.classes, rotation=45, ha="right", fontsize=7
    )
    left.set_yticks([])
    left.grid(False)
    left.set_title("What a CIFAR-10 network remembers: images out of noise")
    series = {label: [summary[key] for summary in summaries] for key, label in BARS.items()}
    plots.bars(
        right, series, list(CASES.values()), ylim=(0, 125), ylabel="top-1 on test images, %",
        title="Fine-tuning on them brings low-bit networks back",
    )  # fmt: skip
    right.set_yticks(range(0, 101, 20))
    right.legend(loc="upper center", ncols=3, fontsize=8)
    save_picture(ROOT / "docs" / "overview.png", plots.png(figure))


if __name__ == "__main__":
    main()
