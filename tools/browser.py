"""Say where the browser of tests/lessons/test_jupyterlab.py is, and with --install get one first.

    python tools/browser.py [--install]

Any Chromium or Chrome will do; the variable DFQLIB_BROWSER names one that is not found by itself. What installs one is
the system's apt-get for root, else Playwright's own download. Exit code: 0 and the path on stdout, or 1 and the reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
APT = ["apt-get", "-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=60"]
PATIENCE = 300  # seconds for one command


def find() -> str | None:
    """The path of a browser that starts."""
    named = os.environ.get("DFQLIB_BROWSER")
    candidates = [named] if named else [*map(shutil.which, NAMES), playwrights_own()]
    return next((path for path in candidates if path and not failure([path, "--version", "--no-sandbox"])), None)


def playwrights_own() -> str | None:
    """Where Playwright keeps the Chromium that it downloads, whether or not it is there."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


def failure(command: list[str]) -> str:
    """Run a command, for a while and without questions; returns the end of why it failed, or nothing."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, env=environment
        )
    except subprocess.CalledProcessError as error:
        return f"{command[0]}: {(error.stdout + error.stderr).decode(errors='replace').strip()[-300:] or error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Find the browser that tests/lessons/test_jupyterlab.py needs.")
    parser.add_argument("--install", action="store_true", help="install one when there is none")
    options = parser.parse_args(arguments)
    found, reasons = find(), [f"no browser among {', '.join(NAMES)}; `make browser` tries to install one"]
    if named := os.environ.get("DFQLIB_BROWSER"):
        reasons = [f"DFQLIB_BROWSER={named} is no browser that starts"]
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        commands = [[*APT, "update"], [*APT, "install", "-y", "--no-install-recommends", "chromium"], *commands]
    for command in commands if options.install else []:
        if found is None:
            print(f"installing a browser for the test in JupyterLab: {' '.join(command)}", file=sys.stderr)
            reasons.append(failure(command))
            found = find()
    print(found or "; ".join(filter(None, reasons)), file=sys.stdout if found else sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
