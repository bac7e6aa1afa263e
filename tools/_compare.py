"""Whether the outputs of a notebook are still those of its code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from configparser import RawConfigParser
from typing import Any

from _notebooks import ROOT, code_cells

SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"
IGNORE = "nbval-ignore-output"


def stale_cells(kept: Any, fresh: Any, *, exact: bool) -> Iterator[str]:
    """Name each code cell whose kept outputs are not those of a fresh run, with what differs first.

    Args:
        kept: the notebook as it is in the repository.
        fresh: the same notebook, just executed.
        exact: compare every byte, on the kind of processor that made the outputs. Otherwise text as nbval does (without
            times, addresses and the like), and of pictures and of cells whose output depends on the machine only that
            there is the same kind of output: another processor's last digits move curves of training visibly.
    """
    for count, (before, after) in enumerate(zip(code_cells(kept), code_cells(fresh), strict=True), start=1):
        ignored = IGNORE in before.metadata.get("tags", [])
        if exact:
            reason = None if before.outputs == after.outputs else "another output"
        elif kinds(before.outputs) != kinds(after.outputs):
            reason = f"another kind of output: {kinds(before.outputs)} kept, {kinds(after.outputs)} made"
        else:
            reason = None if ignored else first_difference(before.outputs, after.outputs)
        if reason:
            yield f"cell [{count}], {before.source.strip().splitlines()[0][:60]!r}: {reason}"


def kinds(outputs: list[Any]) -> list[str]:
    """The kinds of a cell's outputs, as ``["stdout", "image/png+text/plain"]``."""
    return ["+".join(sorted(output.data)) if "data" in output else output.get("name", "error") for output in outputs]


def first_difference(before: list[Any], after: list[Any]) -> str | None:
    """What differs first between outputs of the same kinds."""
    for one, two in zip(before, after, strict=True):
        pairs = {"text": (one.text, two.text)} if "text" in one else {k: (one.data[k], two.data[k]) for k in one.data}
        for kind, (old, new) in pairs.items():
            if kind != "image/png" and sanitized(old) != sanitized(new):
                lines = zip(f"{sanitized(old)}\n".splitlines(), f"{sanitized(new)}\n".splitlines(), strict=False)
                was, made = next(((a, b) for a, b in lines if a != b), ("fewer lines", "more lines"))
                return f"{kind}: {was.strip()!r} kept, {made.strip()!r} made"
    return None


def sanitized(content: Any) -> Any:
    """Text without what legitimately differs between two runs; JSON as it is."""
    if not isinstance(content, str):
        return content
    rules = RawConfigParser()
    rules.read(SANITIZE, encoding="utf-8")
    for rule in rules.sections():
        content = re.sub(rules.get(rule, "regex"), rules.get(rule, "replace"), content)
    return content
