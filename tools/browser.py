"""Say where the browser of tests/lessons/test_jupyterlab.py is, and with --install get one first.

    python tools/browser.py [--install]

Any Chromium or Chrome will do; the variable DFQLIB_BROWSER names one that is not found by itself. What installs one is
the system's apt-get for root, else Playwright's own download. Exit code: 0 and the path on stdout, or 1 and the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
APT = ["apt-get", "-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=60"]
PATIENCE = 300  # seconds for one command


class NoBrowserError(Exception):
    """There is no browser; the message says why."""


def find() -> str:
    """Find a browser that starts.

    Returns:
        The path of its executable.

    Raises:
        NoBrowserError: there is none.
    """
    named = os.environ.get("DFQLIB_BROWSER")
    candidates = [named] if named else [shutil.which(name) for name in NAMES] + [playwrights_own()]
    for path in filter(None, candidates):
        if shutil.which(path) and run([path, "--version", "--no-sandbox"]) is None:
            return path
    if named:
        raise NoBrowserError(f"DFQLIB_BROWSER={named} is no browser that starts")
    raise NoBrowserError(f"no {', '.join(NAMES)}, none of Playwright's own; `make browser` tries to install one")


def playwrights_own() -> str | None:
    """Where Playwright keeps the Chromium that it downloads, whether or not it is there."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


def install() -> list[str]:
    """Try one way after the other until a browser is found.

    Returns:
        What went wrong on the way, a line each.
    """
    problems = []
    ways = [["playwright", "install", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        ways.insert(0, [*APT, "install", "-y", "--no-install-recommends", "chromium"])
        problems.append(run([*APT, "update"]))
    for way in ways:
        print(f"installing a browser for the test in JupyterLab: {way[0]}", file=sys.stderr)
        problems.append(run([sys.executable, "-m", *way] if way[0] == "playwright" else way))
        try:
            find()
        except NoBrowserError:
            continue
        break
    return list(filter(None, problems))


def run(command: list[str]) -> str | None:
    """Run a command, for a while and without questions; return None, or in one line why it failed."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{Path(command[0]).name}: {error}"
    if done.returncode == 0:
        return None
    lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
    telling = [line.strip() for line in lines if re.search(r"error|fail|unable|cannot", line, re.IGNORECASE)]
    return f"{' '.join(command[-2:])}: {(telling or lines)[-1][:200]}"


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Find the browser that tests/lessons/test_jupyterlab.py needs.")
    parser.add_argument("--install", action="store_true", help="install one when there is none")
    options = parser.parse_args(arguments)
    try:
        print(find())
        return 0
    except NoBrowserError as error:
        reasons = [str(error)]
    if options.install:
        reasons = install()
        try:
            print(find())
            return 0
        except NoBrowserError as error:
            reasons.append(str(error))
    print("no browser: " + "; ".join(reasons), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
