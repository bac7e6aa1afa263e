"""Write the README's tables from results/*.json; ``--check`` only says whether they are up to date.

A table stands between ``<!-- results: NAME -->`` and ``<!-- end -->`` and is replaced whole.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {
    "digits_resnet8": "ResNet-8, digits",
    "cifar10_resnet20": "ResNet-20, CIFAR-10",
    "cifar10_resnet56": "ResNet-56, CIFAR-10",
    "cifar100_resnet20": "ResNet-20, CIFAR-100 (not in the library)",
}


def _spread(summary: dict[str, Any], key: str) -> str:
    mean, deviation = summary[key], summary.get(f"{key}_std")
    sign = "+" if key == "difference" else ""
    return f"{mean:{sign}.2f} ± {deviation:.2f}" if deviation is not None else f"{mean:{sign}.2f}"


def accuracy(recipe: str) -> str:
    """One row per case of results/accuracy_<recipe>.json."""
    cases = json.loads((ROOT / "results" / f"accuracy_{recipe}.json").read_text())["cases"]
    lines = [
        "| network | bits | protocol | FP32 | calibrated only | fine-tuned | difference | seconds | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in cases.values():
        case, summary = entry["case"], entry["summary"]
        cells = [
            f"{NETWORKS[case['network']]}, {summary['images']:,} images",
            case["bits"].upper(),
            case["protocol"],
            f"{summary['teacher_top1']:.2f}",
            _spread(summary, "calibrated_top1"),
            f"**{_spread(summary, 'top1')}**",
            _spread(summary, "difference"),
            f"{summary['seconds']:.0f}",
            f"{summary['peak_gb']:.2f} GB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(text: str) -> str:
    """The README's text with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- results: {match[1]} -->\n{accuracy(match[1])}\n<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite README.md, or compare it with what it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the README is out of date")
    args = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    fresh = written(text)
    if args.check:
        if fresh != text:
            print("README.md is out of date: run python benchmarks/tables.py", file=sys.stderr)
        return int(fresh != text)
    path.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
