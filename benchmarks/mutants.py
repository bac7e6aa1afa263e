"""Do the tests notice a wrong number? Single operators and constants are changed and the fast tests of the file run.

    python benchmarks/mutants.py                        # every mutant, half an hour on an idle core
    python benchmarks/mutants.py --sample 40            # so many of each group, chosen by a fixed seed
    python benchmarks/mutants.py losses --missing       # of one group, what no run has caught yet

``mutations.py`` asks the same of the lessons. (mutmut leaves class attributes alone, which the recipes' settings are.)
Each mutant runs in a fork of a process that has imported PyTorch already. Writes results/mutants.json after each; what
is written there by hand under "why" stays. Exit code: 0; 1 when a mutant survived that has no "why".
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "mutants.json"
TIMEOUT = 900
GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "losses": (["losses/*.py"], ["tests/losses"]),
    "quantizer": (
        ["quantizer/functions.py", "quantizer/modules.py", "spec.py"],
        ["tests/quantizer/test_quantizer.py", "tests/quantizer/test_properties.py"],
    ),
    "recipes": (
        [f"recipes/{name}.py" for name in ("dfqf", "gdfq", "zeroq", "dsg", "deepinversion", "dafl", "dfad", "akd")],
        [f"tests/recipes/test_{name}.py" for name in ("published", "weights", "recipes_more", "recipes_papers")],
    ),
}
"""Which files are changed, and which tests are to notice."""
OPERATORS: dict[type, str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">",
}  # fmt: skip
METHODS = {"mean": "sum", "sum": "mean", "amin": "amax", "amax": "amin", "clamp_min": "clamp_max"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file of the package."""

    path: Path
    line: int
    where: str
    change: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.path.as_posix()} {self.where}: {self.change}"


def mutants(group: str) -> Iterator[Mutant]:
    """Every mutant of a group's files; in recipes, of the settings and of what reaches the losses."""
    package = ROOT / "dfqlib"
    for path in sorted(each for pattern in GROUPS[group][0] for each in package.glob(pattern)):
        source = path.read_text(encoding="utf-8")
        seen: Counter[tuple[str, str]] = Counter()
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line.encode()))
        for where, node in numbers(ast.parse(source), settings_only=group == "recipes"):
            for begin, end, new in changes(node, starts, source.encode()):
                old = source.encode()[begin:end].decode()
                text = source.encode()[:begin] + new.encode() + source.encode()[end:]
                line = source.encode()[:begin].count(b"\n") + 1
                said = f"{ast.unparse(node)}: {old.strip()} -> {new.strip()}"
                seen[where, said] += 1
                said += f" ({seen[where, said]})" if seen[where, said] > 1 else ""
                yield Mutant(path.relative_to(package), line, where, said, text.decode())


def numbers(tree: ast.Module, settings_only: bool) -> Iterator[tuple[str, ast.AST]]:
    """Expressions that compute, by the function or class that they are in; not what only checks and words an error."""
    left_out = (
        (ast.Raise, ast.Assert, ast.JoinedStr, ast.AnnAssign) if not settings_only else (ast.Raise, ast.JoinedStr)
    )
    for top in tree.body:
        inner = [top] if isinstance(top, ast.FunctionDef) else top.body if isinstance(top, ast.ClassDef) else []
        for part in inner:
            where = getattr(part, "name", "") if part is top else f"{top.name}.{getattr(part, 'name', 'attributes')}"
            if getattr(part, "name", "") in ("__post_init__", "extra_repr", "__str__"):
                continue
            waiting: list[ast.AST] = [part]
            while waiting:
                node = waiting.pop(0)
                if isinstance(node, left_out) or (
                    isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)
                ):
                    continue
                if not settings_only or isinstance(node, ast.Constant | ast.Attribute):
                    yield where, node
                waiting[:0] = ast.iter_child_nodes(node)


def changes(node: ast.AST, starts: list[int], source: bytes) -> Iterator[tuple[int, int, str]]:
    """Where in the file something else can stand, and what."""

    def span(part: Any) -> tuple[int, int]:
        return starts[part.lineno - 1] + part.col_offset, starts[part.end_lineno - 1] + part.end_col_offset

    if isinstance(node, ast.BinOp | ast.Compare):
        left, operator, right = (
            (node.left, node.op, node.right)
            if isinstance(node, ast.BinOp)
            else (node.left, node.ops[0], node.comparators[0])
        )
        begin, end = span(left)[1], span(right)[0]
        if type(operator) in OPERATORS and not set(source[begin:end]) & set(b"()"):
            yield begin, end, f" {OPERATORS[type(operator)]} "
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if source[span(node)[0] + 1 : span(node)[0] + 2] != b"(":
            yield span(node)[0], span(node.operand)[0], ""
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        yield (
            *span(node),
            repr(not value if isinstance(value, bool) else value + 1 if value in (0, 1, -1) else 2 * value),
        )
    elif isinstance(node, ast.Attribute):
        begin, end = span(node)
        if node.attr in METHODS:
            yield end - len(node.attr), end, METHODS[node.attr]
        owner = ast.unparse(node.value)
        if owner in ("settings", "self.settings", "forge.settings") and ("weight" in node.attr or node.attr in WEIGHTS):
            yield begin, end, "0.0"


WEIGHTS = ("alpha", "r", "tau", "temperature")


def survives(mutant: Mutant, tests: list[str]) -> tuple[bool, str, float]:
    """Run the tests on a package with the change, in a fork; the test that failed, and the seconds."""
    start, (reading, writing) = time.perf_counter(), os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "dfqlib", Path(folder) / "dfqlib", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "dfqlib" / mutant.path).write_text(mutant.source, encoding="utf-8")
        child = os.fork()
        if child == 0:
            os._exit(in_fork(folder, tests, writing))
        os.close(writing)
        with os.fdopen(reading) as report:
            failed = report.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (
        status == 0,
        failed or ("" if status == 0 else "time limit" if status < 0 else "import"),
        (time.perf_counter() - start),
    )


def in_fork(folder: str, tests: list[str], writing: int) -> int:
    import pytest

    class FirstFailure:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                os.write(writing, report.nodeid.partition("[")[0].encode())

    signal.alarm(TIMEOUT)
    sys.path.insert(0, folder)
    os.chdir(ROOT)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        import dfqlib

        assert Path(str(dfqlib.__file__)).is_relative_to(folder)
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests], [FirstFailure()]))
    except BaseException:
        return 70


def main() -> int:
    import hypothesis  # noqa: F401  # what every fork needs, once
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--sample", type=int, help="take so many of each group's mutants, by a fixed seed")
    parser.add_argument("--missing", action="store_true", help="leave out what the results have already caught")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"{sorted(unknown)[0]} is no group; they are {', '.join(GROUPS)}")
    known: dict[str, Any] = json.loads(RESULTS.read_text())["mutants"] if RESULTS.exists() else {}
    open_ends = 0
    for group in options.groups or GROUPS:
        found = list(mutants(group))
        chosen = random.Random(0).sample(found, min(options.sample or len(found), len(found)))
        for mutant in sorted(chosen, key=lambda each: (each.path, each.line)):
            before = known.get(mutant.name, {})
            if options.missing and before.get("caught by"):
                continue
            survived, failed, seconds = survives(mutant, GROUPS[group][1])
            entry = {"line": mutant.line, "caught by": None if survived else failed, "seconds": round(seconds, 1)}
            known[mutant.name] = entry | ({"why": before["why"]} if survived and "why" in before else {})
            open_ends += survived and "why" not in before
            print(f"{mutant.name} (line {mutant.line}) ->", "SURVIVED" if survived else failed, flush=True)
            content = {
                "command": "python benchmarks/mutants.py",
                "versions": {"torch": version("torch")},
                "mutants": dict(sorted(known.items())),
            }
            RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(open_ends > 0)


if __name__ == "__main__":
    sys.exit(main())
