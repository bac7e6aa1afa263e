"""Whether what the lessons claim holds on other seeds and other processors: every assertion, with its margin.

    python tools/claims.py                                   every notebook on seeds 0 to 9, as this machine computes
    python tools/claims.py notebooks/07_*.ipynb --seeds 0-4  one, on fewer
    python tools/claims.py --seeds 0 --processor AVX2 SSE41 --threads 1 2
    python tools/claims.py --table                           write the table again from the runs that are kept

Runs each notebook's code cell by cell in a process of its own and goes on after an assertion that fails. Of an
assertion that compares numbers the margin is how far the nearest comparison is from failing, in the units of what is
compared. Runs are kept as they come in ``--output`` (a run that is there is not made again unless the code has
changed), and the table stands beside it. Exit code: 0; 1 when a claim failed or a notebook did not run to its end;
2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import ast
import json
import linecache
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _notebooks import NOTEBOOKS, ROOT, code_cells, code_digest, find_notebooks

PROCESSORS = {
    "this": {},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SSE41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
"""The environment that makes PyTorch's libraries take the kernels of another processor."""
OUTPUT = ROOT / "results" / "claims.json"


@dataclass(frozen=True)
class Case:
    """One run of one notebook."""

    name: str
    path: Path
    seed: int
    processor: str
    threads: int

    @property
    def key(self) -> str:
        return f"{self.name} seed {self.seed} {self.processor} {self.threads}"


def smallest_margin(node: ast.expr) -> ast.expr | None:
    """An expression for the margin of a condition; None where it compares nothing.

    A conjunction has the smallest margin of its parts, a disjunction the largest.
    """
    if isinstance(node, ast.Compare) and all(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops):
        pairs, left = [], node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            pairs.append(_call("_gap", left, right) if isinstance(op, ast.Lt | ast.LtE) else _call("_gap", right, left))
            left = right
        return _call("min", ast.List(list(pairs), ast.Load()))
    if isinstance(node, ast.BoolOp):
        parts = [part for part in map(smallest_margin, node.values) if part is not None]
        if not parts:
            return None
        return _call("min" if isinstance(node.op, ast.And) else "max", ast.List(parts, ast.Load()))
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "all":
            return smallest_margin(node.func.value)
        if isinstance(node.func, ast.Name) and node.func.id == "all" and isinstance(node.args[0], ast.GeneratorExp):
            inner = smallest_margin(node.args[0].elt)
            return None if inner is None else _call("min", ast.GeneratorExp(inner, node.args[0].generators))
    return None


def _call(name: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def _gap(low: Any, high: Any) -> float:
    """The smallest of ``high - low`` over numbers, tensors and tables."""
    import numpy as np

    difference = high - low
    return float(np.min(np.asarray(difference.detach() if hasattr(difference, "detach") else difference)))


class _Recorded(ast.NodeTransformer):
    """Turns ``assert condition`` into a note of its text, whether it holds and by how much."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        margin = smallest_margin(node.test) or ast.Constant(None)
        thunks = [ast.Lambda(ast.arguments([], [], None, [], [], None, []), each) for each in (node.test, margin)]
        note = ast.Expr(_call("_claim", ast.Constant(ast.unparse(node.test)), *thunks))
        return ast.copy_location(note, node)


def run_notebook(path: Path, seed: int) -> dict[str, Any]:
    """Execute the code of a notebook in this process; returns its claims, and the error that ended it."""
    import nbformat

    claims: list[dict[str, Any]] = []
    place = 0

    def claim(text: str, holds: Any, margin: Any) -> None:
        try:
            distance = margin()
        except Exception:  # a margin of things that cannot be subtracted
            distance = None
        kept = {"cell": place, "claim": text, "holds": bool(holds())}
        if distance is not None and math.isfinite(distance):
            kept["margin"] = float(f"{distance:.4g}")
        claims.append(kept)

    os.chdir(path.parent)
    names: dict[str, Any] = {"__name__": "__main__", "_claim": claim, "_gap": _gap}
    for place, cell in enumerate(code_cells(nbformat.read(path, as_version=4)), start=1):
        source = cell.source
        if "parameters" in cell.metadata.get("tags", []):
            source += f"\nseed = {seed}"
        file = f"<{path.name} [{place}]>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # inspect.getsource
        tree = ast.fix_missing_locations(_Recorded().visit(ast.parse(source)))
        try:
            exec(compile(tree, file, "exec"), names)
        except Exception as error:
            return {"claims": claims, "error": f"cell [{place}]: {type(error).__name__}: {error}"}
    return {"claims": claims}


def run_apart(case: Case) -> dict[str, Any]:
    """The record of a case, from a process that stands on its processor."""
    from dfqlib.training.machine import processor

    environment = {
        **os.environ,
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": str(case.threads),
        **PROCESSORS[case.processor],
    }
    command = [sys.executable, __file__, "--one", str(case.path), str(case.seed)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.splitlines()
    try:
        record = json.loads(lines[-1].removeprefix("claims: "))
    except (IndexError, ValueError):
        record = {"claims": [], "error": f"ended with {done.returncode}: {done.stderr.strip()[-300:]}"}
    seconds = round(time.perf_counter() - started, 1)
    return record | {"seconds": seconds, "code": digest(case.path), "device": processor()}


def digest(path: Path) -> str:
    """Of a notebook's code."""
    import nbformat

    return code_digest(nbformat.read(path, as_version=4))


def outdated_runs(name: str, path: Path, runs: dict[str, Any]) -> list[str]:
    """The runs of a notebook whose code has changed since."""
    code = digest(path)
    return [key for key, run in runs.items() if key.startswith(f"{name} seed ") and run["code"] != code]


def failures(record: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a run, line by line."""
    for each in record["claims"]:
        if not each["holds"]:
            margin = f" by {-each['margin']:.3g}" if "margin" in each else ""
            yield f"cell [{each['cell']}] fails{margin}: {each['claim'][:150]}"
    if "error" in record:
        yield record["error"]


def table(runs: dict[str, Any]) -> str:
    """Every claim: on how many runs it held, its smallest margin and the spread of its margins."""
    lines = ["# What the lessons claim, on other seeds and processors", ""]
    machines = sorted({record["device"] for record in runs.values() if "device" in record})
    lines += ["Written by `python tools/claims.py`; margins are in the units of what is compared.", ""]
    lines += [
        f"Computed on: {'; '.join(machines)}. AVX2 and SSE41 limit PyTorch there to an older processor's kernels.",
        "",
    ]
    by_notebook: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for key, record in sorted(runs.items()):
        name, _, where = key.partition(" seed ")
        by_notebook.setdefault(name, []).append((where, record))
    for name, records in by_notebook.items():
        wheres = [where.split() for where, _ in records]
        seeds = sorted({int(seed) for seed, processor, _ in wheres if processor == "this"})
        others = sorted({f"{processor} on {threads}" for _, processor, threads in wheres if processor != "this"})
        lines += [
            f"## {name}",
            "",
            f"{len(records)} runs: seeds {seeds} here" + ("; " if others else "") + ", ".join(others),
        ]
        lines += ["", "| cell | claim | held | smallest margin | mean ± deviation |", "|---|---|---|---|---|"]
        found: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for _, record in records:
            for each in record["claims"]:
                found.setdefault((each["cell"], each["claim"]), []).append(each)
        for (cell, claim), each in sorted(found.items()):
            margins = [one["margin"] for one in each if "margin" in one]
            spread = f"{statistics.mean(margins):.3g} ± {statistics.pstdev(margins):.2g}" if margins else ""
            least = f"{min(margins):.3g}" if margins else ""
            held = f"{sum(one['holds'] for one in each)} of {len(each)}"
            text = claim.replace("|", "\\|")
            lines.append(f"| {cell} | `{text}` | {held} | {least} | {spread} |")
        lines.append("")
    return "\n".join(lines)


def read_seeds(text: str) -> list[int]:
    """``"0-9"`` or ``"3"`` as numbers."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders (default: notebooks/)")
    parser.add_argument("--seeds", type=read_seeds, default=list(range(10)), metavar="0-9")
    parser.add_argument("--processor", nargs="+", choices=PROCESSORS, default=["this"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("-j", "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many at a time")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.one:
        record = run_notebook(Path(options.one[0]), int(options.one[1]))
        print(f"\nclaims: {json.dumps(record)}")
        return 0
    try:
        notebooks = find_notebooks(options.paths or [NOTEBOOKS])
    except FileNotFoundError as error:
        parser.error(str(error))
    kept = json.loads(options.output.read_text(encoding="utf-8"))["runs"] if options.output.exists() else {}
    outdated = {key for name, path in find_notebooks([]).items() for key in outdated_runs(name, path, kept)}
    runs = {key: record for key, record in kept.items() if key not in outdated}
    cases = [
        Case(name, path, seed, processor, threads)
        for name, path in notebooks.items()
        for processor in options.processor
        for threads in options.threads
        for seed in options.seeds
    ]
    missing = [case for case in cases if runs.get(case.key, {}).get("code") != digest(case.path)]
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        pending = {pool.submit(run_apart, case): case for case in ([] if options.table else missing)}
        for done in as_completed(pending):
            case, record = pending[done], done.result()
            runs[case.key] = record
            wrong = list(failures(record))
            print(
                f"{'FAILED' if wrong else 'ok':6} {case.key:50} {record['seconds']:6.1f} s",
                *wrong,
                sep="\n  ",
                flush=True,
            )
            keep(options.output, runs)
    keep(options.output, runs)
    return int(any(list(failures(runs[case.key])) for case in cases if case.key in runs))


def keep(path: Path, runs: dict[str, Any]) -> None:
    """Write the runs, and the table beside them."""
    from dfqlib.training.files import written_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": "python tools/claims.py", "runs": dict(sorted(runs.items()))}
    for target, text in ((path, json.dumps(content, indent=None)), (path.with_suffix(".md"), table(runs))):
        with written_whole(target) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
