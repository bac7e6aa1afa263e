"""Write the tables of README.md and results/README.md from results/*.json; ``--check`` only compares.

A table stands between ``<!-- results: NAME -->`` and ``<!-- end -->`` and is replaced whole; NAME is one of TABLES. A
table whose results file is not there stops the program with the command that measures it.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from cases import CASES
from harness import ROOT, Row, rows_of
from speed import FAST, FLOAT, NAIVE, OURS, against
from speed import TABLES as SPEED

NETWORKS = {
    "digits_resnet8": "ResNet-8, digits",
    "cifar10_resnet20": "ResNet-20, CIFAR-10",
    "cifar10_resnet56": "ResNet-56, CIFAR-10",
    "cifar100_resnet20": "ResNet-20, CIFAR-100 (not in the library)",
}
MATRIX = {
    "cifar10_w4a4": "W4A4, ends 8 bits",
    "cifar10_w3a3": "W3A3, ends 8 bits",
    "cifar10_w4a4_channel": "W4A4, ends 8 bits, per channel",
    "cifar10_w3a3_channel": "W3A3, ends 8 bits, per channel",
    "cifar10_w4a4_all": "W4A4, all layers",
    "cifar10_w3a3_all": "W3A3, all layers",
}
DIGITS = "digits_w3a3"
RECIPES = {
    ("real", ""): "`real`: 1,024 training images, the ceiling",
    ("express", ""): "`express`, ours",
    ("gdfq", ""): "`gdfq`",
    ("dfqf", ""): "`dfqf`",
    ("dfqf", "warm_up_epochs=16,batch=256"): "`dfqf`, batches of 256, twice the warm-up",
    ("akd", ""): "`akd`",
    ("deepinversion", ""): "`deepinversion`",
    ("dafl", ""): "`dafl`",
    ("dfad", ""): "`dfad`",
    ("dsg", ""): "`dsg`, fine-tuned",
    ("zeroq", ""): "`zeroq`, ranges only",
    ("equalize", ""): "`equalize`, no training",
    ("calibrate", "clip=mse"): "`calibrate`, MSE",
    ("calibrate", "clip=aciq"): "`calibrate`, ACIQ",
    ("calibrate", "clip=kl"): "`calibrate`, KL",
    ("calibrate", "clip=max"): "`calibrate`, MAX",
}
"""(recipe, variant) -> what the tables call it, from the most to the least that is trained."""
PUBLISHED = {"cifar10_w4a4_all": -1.27, "cifar10_w3a3_all": -5.92}
"""Drops of SynQ (Kim et al., ICLR 2025, Table 2), ResNet-20 on CIFAR-10, all layers."""


def rows_in(name: str, command: str) -> list[Row]:
    """A results file's rows; where there are none, the program ends with the command that measures them."""
    rows = rows_of(ROOT / "results" / f"{name}.json")
    if not rows:
        raise SystemExit(f"results/{name}.json is not there: python benchmarks/{command} measures it")
    return rows


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Runs of accuracy.py on one thread, by case, budget and variant, ordered by seed."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["job"]["seed"]):
        job = row["job"]
        if job["threads"] == 1:
            found.setdefault((job["case"], job["budget"], job["variant"]), []).append(row)
    return found


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds; the most memory."""
    found: dict[str, Any] = {"teacher_top1": rows[0]["teacher_top1"], "peak_gb": max(row["peak_gb"] for row in rows)}
    for key in ("top1", "difference", "calibrated_top1", "seconds", "cpu_seconds"):
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            found[key] = statistics.mean(values)
            found[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return found


def recipe_groups(recipe: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The summaries of a recipe's runs, by case, budget and variant."""
    found = groups(rows_in(f"accuracy_{recipe}", f"accuracy.py --recipe {recipe}"))
    return {key: summary(rows) for key, rows in found.items()}


def front() -> str:
    """What express loses, beside the best published method and real data."""
    ours, real = recipe_groups("express"), recipe_groups("real")
    head = [
        "",
        "`express`, quick (90 CPU seconds)",
        "`express`, published (240)",
        "best published",
        "1,024 real images",
    ]
    rows = []
    for case, published in PUBLISHED.items():
        measured = [ours[case, "quick", ""], ours[case, "published", ""], real[case, "quick", ""]]
        quick, long, ceiling = (spread(each, "difference") for each in measured)
        rows.append([MATRIX[case].partition(",")[0], quick, long, f"{published:.2f}", ceiling])
    return table(head, rows)


def express() -> str:
    """One row per case, budget and variant of express."""
    found = groups(rows_in("accuracy_express", "accuracy.py"))
    head = ["network: FP32 top-1", "protocol", "bits", "budget", "seeds", "calibrated only", "fine-tuned", "difference"]
    lines = []
    for (name, budget, variant), rows in sorted(found.items(), key=lambda item: place(*item[0])):
        case, each = CASES[name], summary(rows)
        lines.append([
            f"{NETWORKS[case.network]}: {each['teacher_top1']:.2f} of {rows[0]['images']:,} images",
            case.protocol,
            f"W{case.bits}A{case.bits}",
            f"{budget}, `{variant}`" if variant else budget,
            str(len(rows)),
            spread(each, "calibrated_top1"),
            f"**{spread(each, 'top1')}**",
            spread(each, "difference"),
            f"{each['cpu_seconds']:.0f}",
            f"{each['peak_gb']:.2f} GB",
        ])  # fmt: skip
    return table([*head, "CPU seconds", "peak memory"], lines)


def place(name: str, budget: str, variant: str) -> tuple[Any, ...]:
    """Where a row of express stands: by network, protocol, bit width, budget."""
    case = CASES[name]
    return list(NETWORKS).index(case.network), case.protocol, -case.bits, variant, budget != "quick"


def recipes() -> str:
    """One row per recipe and variant, a column per protocol and bit width: the difference from the teacher."""
    found = {recipe: recipe_groups(recipe) for recipe, _ in RECIPES}
    columns = {case: name for case, name in MATRIX.items() if (case, "quick", "") in found["express"]}
    lines = []
    for (recipe, variant), name in RECIPES.items():
        cells = [found[recipe].get((case, "quick", variant)) for case in columns]
        there = [each for each in cells if each]
        seconds = statistics.mean(each["cpu_seconds"] for each in there)
        memory = max(each["peak_gb"] for each in there)
        differences = [spread(each, "difference") if each else "" for each in cells]
        lines.append([name, *differences, f"{seconds:.0f}", f"{memory:.2f} GB"])
    return table(["recipe", *columns.values(), "CPU seconds", "peak memory"], lines)


def digits() -> str:
    """One row per recipe on the bundled digits: what calibration leaves, what the recipe reaches, its seconds."""
    lines = []
    for (recipe, variant), name in RECIPES.items():
        each = recipe_groups(recipe).get((DIGITS, "quick", variant))
        if each:
            reached = [spread(each, "calibrated_top1"), spread(each, "top1")]
            lines.append([name, *reached, f"{each['cpu_seconds']:.0f}"])
    return table(["recipe", "calibrated", "the recipe's network", "CPU seconds"], lines)


def search() -> str:
    """One row per variant that was tried: points gained over the quick budget, paired by seed."""
    rows = rows_in("accuracy_search", "accuracy.py --file search --judge train --seeds 100 101 --set ...")
    points = {(row["job"]["case"], row["job"]["variant"], row["job"]["seed"]): row["difference"] for row in rows}
    cases, variants, seeds = (list(dict.fromkeys(column)) for column in zip(*points, strict=True))
    names = [f"{NETWORKS[CASES[c].network]}, W{CASES[c].bits}A{CASES[c].bits}, {CASES[c].protocol}" for c in cases]
    lines = []
    for variant in filter(None, variants):
        cells = []
        for case in cases:
            pairs = [(points.get((case, variant, seed)), points.get((case, "", seed))) for seed in seeds]
            gained = [ours - quick for ours, quick in pairs if ours is not None and quick is not None]
            cells.append(mean(gained, "+") if gained else "")
        lines.append([f"`{variant}`", *cells])
    return table(["instead of quick's", *names], lines)


def export() -> str:
    """One row per bit width and container, over the seeds."""
    found: dict[tuple[str, bool, str], list[Row]] = {}
    for row in rows_in("export", "deploy.py"):
        for container in ("int8", "int4"):
            if container in row:
                key = (row["job"]["bits"], row["job"]["fine_tuned"], container)
                found.setdefault(key, []).append({**row, **row[container]})
    lines = []
    for (bits, fine_tuned, container), runs in found.items():
        measures = ("agreement_test_images", "agreement_random_images", "exact_agreement")
        agreement = min(run[key] for run in runs for key in measures)
        kind = f"{'fine-tuned' if fine_tuned else 'calibrated only'}, {len(runs)} seeds"
        cells = [NETWORKS["cifar10_resnet20"], f"{bits.upper()}, {kind}", container, f"{agreement:.1f} %"]
        cells.append(f"{runs[0]['fp32_top1']:.2f}")
        cells += [mean([run[key] for run in runs]) for key in ("model_top1", "file_top1", "saturating_top1")]
        cells.append(f"1/{runs[0]['fp32_bytes'] / runs[0]['file_bytes']:.1f}")
        lines.append([*cells, *(speedups(runs, batch) for batch in ("1", "64"))])
    head = ["network", "bits", "container", "file = simulation", "FP32", "in PyTorch", "file", "without VNNI", "size"]
    return table([*head, "batch 1", "batch 64"], lines)


def speedups(runs: Sequence[Row], batch: str) -> str:
    """How many times faster than FP32 in PyTorch and in ONNX Runtime, median of the runs."""
    times = [run["milliseconds"] for run in runs]
    return " / ".join(
        f"{statistics.median(each[engine][batch] / each['integer file'][batch] for each in times):.1f}×"
        for engine in ("PyTorch FP32", "ONNX Runtime FP32")
    )


def by_threads(rows: Sequence[Row]) -> dict[int, dict[str, Any]]:
    """Number of threads -> table -> its row of results/speed.json."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if "threads" in row["job"]:
            found.setdefault(row["job"]["threads"], {})[row["job"]["table"]] = row
    return found


def targets() -> str:
    """One row per ratio that matters: ours against ordinary training and against the naive step."""
    measured = by_threads(rows_in("speed", "speed.py"))
    lines = []
    for base in (FLOAT, NAIVE):
        for variant in (OURS, FAST):
            ratios = [f"{against(each['fine-tuning'], variant, base):.2f}" for each in measured.values()]
            lines.append([f"{variant}, against {base}", *ratios])
    return table(["throughput of the iteration", *map(threads, measured)], lines)


def speed() -> str:
    """Two tables: iterations of fine-tuning, and of making images; numbers of threads side by side."""
    rows = rows_in("speed", "speed.py")
    measured = by_threads(rows)
    memory = {(row["job"]["table"], row["job"]["variant"]): row["peak_gb"] for row in rows if "peak_gb" in row}
    parts = []
    for kind, names in (("fine-tuning", ["fine-tuning"]), ("making images", ["synthesis", "generator"])):
        head, lines = [f"iteration of {kind}"], []
        for count in measured:
            compared = [FLOAT, NAIVE.removeprefix("W4A4, ")] if kind == "fine-tuning" else ["the first"]
            head += [f"img/s, {threads(count)}", *(f"× {base}" for base in compared)]
        for name in names:
            for variant in SPEED[name]:
                cells = [variant if kind == "fine-tuning" else f"{name}: {variant}"]
                for tables in measured.values():
                    bases = [FLOAT, NAIVE] if kind == "fine-tuning" else [next(iter(SPEED[name]))]
                    cells.append(f"{tables[name]['images_per_second'][variant]:.0f}")
                    cells += [f"{against(tables[name], variant, base):.2f}" for base in bases]
                lines.append([*cells, f"{memory[name, variant]:.2f} GB"])
        parts.append(table([*head, "peak memory"], lines))
    return "\n\n".join(parts)


def lessons() -> str:
    """One row per lesson that was rerun on CIFAR-10."""
    lines = []
    for row in rows_in("lessons", "lessons.py"):
        name = row["job"]["lesson"]
        link = f"[{name[:2]} {name[3:].replace('_', ' ')}](../notebooks/{name}.ipynb)"
        lines.append([link, f"[charts](lessons/{name}.png)", f"{row['seconds'] / 60:.0f}", f"{row['peak_gb']:.1f} GB"])
    return table(["lesson", "on CIFAR-10", "minutes", "peak memory"], lines)


def threads(count: int) -> str:
    """A number of threads in words."""
    return f"{count} thread{'s' * (count != 1)}"


def spread(found: dict[str, Any], key: str) -> str:
    """A summary's mean ± standard deviation, with its sign where it is a difference."""
    sign, deviation = "+" if key == "difference" else "", found[f"{key}_std"]
    return f"{found[key]:{sign}.2f} " + (f"± {deviation:.2f}" if deviation is not None else "(one run)")


def mean(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation, or the single value."""
    deviation = f"± {statistics.stdev(values):.2f}" if len(values) > 1 else "(one run)"
    return f"{statistics.mean(values):{sign}.2f} {deviation}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


TABLES = {each.__name__: each for each in (front, express, recipes, digits, search, export, targets, speed, lessons)}


def written(text: str) -> str:
    """A document's text with every table made anew."""
    return re.sub(
        r"<!-- results: (\w+) -->\n.*?<!-- end -->",
        lambda match: f"<!-- results: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    """Rewrite both documents, or compare them with what they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a document is out of date")
    args = parser.parse_args()
    stale = False
    for name in ("README.md", "results/README.md"):
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        fresh = written(text)
        if args.check and fresh != text:
            print(f"{name} is out of date: run python benchmarks/tables.py", file=sys.stderr)
            stale = True
        elif not args.check:
            path.write_text(fresh, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
