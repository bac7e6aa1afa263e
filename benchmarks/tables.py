"""Write the tables of README.md and results/README.md from results/*.json; ``--check`` only compares.

A table stands between ``<!-- results: NAME -->`` and ``<!-- end -->`` and is replaced whole. NAME is "recipes",
"digits", "ideas", "search", "export", "speed" or "targets", or a recipe for its cases. A table whose results file is
not there stops the program with the command that measures it.
"""

import argparse
import json
import re
import statistics
import sys
from typing import Any

from cases import CASES
from harness import ROOT, against
from search import gains

NETWORKS = {
    "digits_resnet8": "ResNet-8, digits",
    "cifar10_resnet20": "ResNet-20, CIFAR-10",
    "cifar10_resnet56": "ResNet-56, CIFAR-10",
    "cifar100_resnet20": "ResNet-20, CIFAR-100 (not in the library)",
}

MATRIX = {
    "cifar10_w4a4": "W4A4, ends 8 bits",
    "cifar10_w3a3": "W3A3, ends 8 bits",
    "cifar10_w4a4_all": "W4A4, all layers",
    "cifar10_w3a3_all": "W3A3, all layers",
}
DIGITS = "digits_w3a3"
IDEA_CASES = {name: MATRIX[name] for name in ("cifar10_w4a4", "cifar10_w3a3")}
ROWS = {
    ("real", ""): "`real`: 1,024 training images, the ceiling",
    ("express", ""): "`express`, ours",
    ("gdfq", ""): "`gdfq`",
    ("dfqf", ""): "`dfqf`",
    ("dfqf", "batch256"): "`dfqf`, batches of 256, twice the warm-up",
    ("akd", ""): "`akd`",
    ("deepinversion", ""): "`deepinversion`",
    ("dafl", ""): "`dafl`",
    ("dfad", ""): "`dfad`",
    ("dsg", ""): "`dsg`, fine-tuned",
    ("dsg", "adaround"): "`dsg`, AdaRound",
    ("dsg", "calibrate"): "`dsg`, ranges only",
    ("zeroq", ""): "`zeroq`, ranges only",
    ("equalize", ""): "`equalize`, no training",
    ("calibrate", "mse"): "`calibrate`, MSE",
    ("calibrate", "aciq"): "`calibrate`, ACIQ",
    ("calibrate", "kl"): "`calibrate`, KL",
    ("calibrate", "max"): "`calibrate`, MAX",
}
"""(recipe, variant) -> what the table calls it, from the most to the least that is trained."""


def _spread(summary: dict[str, Any], key: str) -> str:
    mean, deviation = summary[key], summary.get(f"{key}_std")
    sign = "+" if key == "difference" else ""
    return f"{mean:{sign}.2f} ± {deviation:.2f}" if deviation is not None else f"{mean:{sign}.2f} (one run)"


def accuracy(recipe: str) -> str:
    """One row per case of results/accuracy_<recipe>.json."""
    cases = _content(f"accuracy_{recipe}", f"accuracy.py --recipe {recipe}")["cases"]
    head = ["network: FP32 top-1", "protocol", "bits", "budget", "seeds", "calibrated only", "fine-tuned", "difference"]
    rows = []
    for entry in sorted((entry for entry in cases.values() if not entry.get("variant")), key=_place):
        case, summary = entry["case"], entry["summary"]
        rows.append([
            f"{NETWORKS[case['network']]}: {summary['teacher_top1']:.2f} of {summary['images']:,} images",
            case["protocol"],
            case["bits"].upper(),
            entry["budget"],
            str(len(summary["seeds"])),
            _spread(summary, "calibrated_top1"),
            f"**{_spread(summary, 'top1')}**",
            _spread(summary, "difference"),
            f"{summary['cpu_seconds']:.0f}" if "cpu_seconds" in summary else "",
            f"{summary['peak_gb']:.2f} GB",
        ])  # fmt: skip
    return _table([*head, "CPU seconds", "peak memory"], rows)


def _place(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Where a case stands in its recipe's table: by network, protocol, widths, budget."""
    case = entry["case"]
    return list(NETWORKS).index(case["network"]), case["protocol"], -int(case["bits"][1]), entry["budget"] != "quick"


def recipes() -> str:
    """One row per recipe and variant, a column per widths and protocol: the difference from the teacher in points."""
    lines = [
        "| recipe | " + " | ".join(MATRIX.values()) + " | CPU seconds | peak memory |",
        "|---|" + "---|" * (len(MATRIX) + 2),
    ]
    for (recipe, variant), name in ROWS.items():
        entries = [_cases(recipe).get(":".join(filter(None, (case, variant)))) for case in MATRIX]
        summaries = [entry["summary"] for entry in entries if entry]
        if not summaries:
            continue
        cells = [_spread(entry["summary"], "difference") if entry else "" for entry in entries]
        seconds = [summary["cpu_seconds"] for summary in summaries if "cpu_seconds" in summary]
        cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "")
        cells.append(f"{max(summary['peak_gb'] for summary in summaries):.2f} GB")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PUBLISHED = {"cifar10_w4a4_all": -1.27, "cifar10_w3a3_all": -5.92}
"""Drops of SynQ (Kim et al., ICLR 2025, Table 2), ResNet-20 on CIFAR-10, all layers."""


def front() -> str:
    """What express loses, beside the best published method and real data."""
    rows = []
    for case, published in PUBLISHED.items():
        ours = [_cases("express").get(f"{case}{end}") for end in ("", ":published")]
        real = _cases("real")[case]["summary"]
        cells = [_spread(entry["summary"], "difference") if entry else "" for entry in ours]
        rows.append([MATRIX[case].partition(",")[0], *cells, f"{published:.2f}", _spread(real, "difference")])
    head = [
        "",
        "`express`, quick (90 CPU seconds)",
        "`express`, published (240)",
        "best published",
        "1,024 real images",
    ]
    return _table(head, rows)


def digits() -> str:
    """One row per recipe on the bundled digits: what calibration leaves, what the recipe reaches, its seconds."""
    rows = []
    for (recipe, variant), name in ROWS.items():
        entry = _cases(recipe).get(":".join(filter(None, (DIGITS, variant))))
        if entry:
            summary = entry["summary"]
            cells = [_spread(summary, "calibrated_top1"), _spread(summary, "top1"), f"{summary['cpu_seconds']:.0f}"]
            rows.append([name, *cells])
    return _table(["recipe", "calibrated", "the recipe's network", "CPU seconds"], rows)


def ideas() -> str:
    """The four later ideas, each alone: the difference from express without it, run by run (paired by seed)."""
    lines = ["| express with | " + " | ".join(IDEA_CASES.values()) + " |", "|---|" + "---|" * len(IDEA_CASES)]
    cases = _content("accuracy_express", "accuracy.py")["cases"]
    for variant in dict.fromkeys(entry["variant"] for entry in cases.values() if entry.get("variant")):
        cells = []
        for case in IDEA_CASES:
            if f"{case}:{variant}" not in cases:
                cells.append("")
                continue
            plain = {run["settings"]["seed"]: run["top1"] for run in cases.get(case, {"runs": []})["runs"]}
            runs = cases[f"{case}:{variant}"]["runs"]
            gained = [run["top1"] - plain[seed] for run in runs if (seed := run["settings"]["seed"]) in plain]
            cells.append(_signed(gained) if gained else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cases(recipe: str) -> dict[str, Any]:
    """A recipe's cases; none as long as nobody has measured it."""
    path = ROOT / "results" / f"accuracy_{recipe}.json"
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def _content(name: str, command: str) -> dict[str, Any]:
    """A results file; where there is none, the program ends with the command that makes it."""
    path = ROOT / "results" / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"results/{name}.json is not there: python benchmarks/{command} measures it")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def search() -> str:
    """One row per variant of results/search.json: points gained over the quick budget, paired by seed."""
    rows = _content("search", "search.py")["runs"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = [f"{NETWORKS[CASES[case].network]}, {CASES[case].bits.upper()}, {CASES[case].protocol}" for case in cases]
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows if row["variant"]):
        paired = {case: gains(rows, case, variant) for case in cases}
        cells = [_signed(values) if values else "" for values in paired.values()]
        lines.append([f"`{variant}`", *cells])
    return _table(["instead of quick's", *names], lines)


def _signed(values: list[float]) -> str:
    spread = f"± {statistics.stdev(values):.2f}" if len(values) > 1 else "(one run)"
    return f"{statistics.mean(values):+.2f} {spread}"


def export() -> str:
    """One row per widths and container of results/export.json, over its seeds."""
    content = _content("export", "deploy.py")
    lines = [
        "| network | bits | container | file = simulation | FP32 | in PyTorch | file | without VNNI | size | batch 1 | "
        "batch 64 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in content["runs"]:
        for container in ("int8", "int4"):
            if container in run:
                groups.setdefault((run["bits"], container), []).append({**run, **run[container]})
    for (bits, container), runs in groups.items():
        measures = ("agreement_test_images", "agreement_random_images", "exact_agreement")
        agreement = min(run[key] for run in runs for key in measures)
        top1 = [_mean([run[key] for run in runs]) for key in ("model_top1", "file_top1", "saturating_top1")]
        tuned = f"{'fine-tuned' if runs[0]['fine_tuned'] else 'calibrated only'}, {len(runs)} seeds"
        size = runs[0]["fp32_bytes"] / runs[0]["file_bytes"]
        cells = [content["network"], f"{bits.upper()}, {tuned}", container, f"{agreement:.1f} %"]
        cells += [f"{runs[0]['fp32_top1']:.2f}", *top1, f"1/{size:.1f}"]
        cells += [_speedups(runs, batch) for batch in ("1", "64")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed() -> str:
    """Two tables of results/speed.json: steps of fine-tuning, and of making images; threads side by side."""
    content = _content("speed", "speed.py")
    bases = list(dict.fromkeys(each["against"] for each in content["targets"]))
    rows: dict[bool, list[list[str]]] = {True: [], False: []}
    for table, ways in next(iter(content["threads"].values())).items():
        tuning = table == "fine-tuning"
        for name, way in ways.items():
            cells = [name if tuning else f"{table}: {name}"]
            for tables in content["threads"].values():
                cells.append(f"{tables[table][name]['images_per_second']:.0f}")
                compared = bases if tuning else [next(iter(ways))]
                cells += [f"{against(tables[table], name, base):.2f}" for base in compared]
            rows[tuning].append([*cells, f"{way['peak_gb']:.2f} GB"])
    return "\n\n".join(
        _table([f"step of {kind}", *_columns(content["threads"], compared), "peak memory"], rows[kind == "fine-tuning"])
        for kind, compared in (("fine-tuning", bases), ("making images", ["the first"]))
    )


def _columns(by_threads: dict[str, Any], bases: list[str]) -> list[str]:
    ratios = [f"× {base.removeprefix('W4A4, ')}" for base in bases]
    return [column for name in by_threads for column in (f"img/s, {_threads(name)}", *ratios)]


def targets() -> str:
    """One row per ratio that matters, from results/speed.json."""
    content = _content("speed", "speed.py")
    rows = [
        [f"{each['way']}, against {each['against']}"] + [f"{each['measured'][name]:.2f}" for name in content["threads"]]
        for each in content["targets"]
    ]
    return _table(["throughput of the step", *map(_threads, content["threads"])], rows)


def _threads(name: str) -> str:
    return f"{name} thread{'s' * (name != '1')}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _mean(values: list[float]) -> str:
    """Mean ± standard deviation, or the single value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _speedups(runs: list[dict[str, Any]], batch: str) -> str:
    """How many times faster than FP32 in PyTorch and in ONNX Runtime, median of the runs."""
    ratios = [
        statistics.median(
            run["milliseconds"][engine][batch] / run["milliseconds"]["integer file"][batch] for run in runs
        )
        for engine in ("PyTorch FP32", "ONNX Runtime FP32")
    ]
    return " / ".join(f"{ratio:.1f}×" for ratio in ratios)


def written(text: str) -> str:
    """A document's text with every table made anew."""
    made = {each.__name__: each for each in (front, recipes, digits, ideas, search, export, speed, targets)}

    def table(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- results: {name} -->\n{made[name]() if name in made else accuracy(name)}\n<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite both documents, or compare them with what they should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the README is out of date")
    args = parser.parse_args()
    stale = False
    for name in ("README.md", "results/README.md"):
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        fresh = written(text)
        if args.check and fresh != text:
            print(f"{name} is out of date: run python benchmarks/tables.py", file=sys.stderr)
        elif not args.check:
            path.write_text(fresh, encoding="utf-8")
        stale = stale or fresh != text
    return int(args.check and stale)


if __name__ == "__main__":
    sys.exit(main())
