"""A lesson in JupyterLab, as its reader meets it: opened in a browser, run from top to bottom, and played with.

Skips where there is no browser (`make browser` installs one where it may) or no Playwright.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
LESSON = "01_toy_boundary_matching.ipynb"
QUICKER = {"points": 250, "layers": 2, "runs": 1}  # parameters of the lesson
STARTED, RAN, REDRAWN = 120, 300, 120  # seconds of patience; far more than it takes
# Cells outside the window are not in the page otherwise.
WHOLE_NOTEBOOK = {"windowingMode": "none"}
BROWSER_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]

READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady"  # the kernel has answered
# Every cell that is to run shows a star until it has run, or one before it has failed.
SETTLED = """() => {
    const prompts = Array.from(document.querySelectorAll(".jp-CodeCell .jp-InputPrompt"), each => each.textContent);
    return prompts.some(text => /\\d/.test(text)) && !prompts.some(text => text.includes("*"));
}"""
PIXELS = """async image => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return Array.from(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))).join();
}"""


@pytest.fixture(scope="module")
def browser_path() -> str:
    pytest.importorskip("playwright.sync_api", reason='no Playwright: pip install -c constraints.txt -e ".[browser]"')
    command = [sys.executable, str(ROOT / "tools" / "browser.py")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    return found.stdout.strip()


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the lesson, without outputs and with parameters that make it quick."""
    folder = tmp_path_factory.mktemp("lessons")
    notebook = nbformat.read(ROOT / "notebooks" / LESSON, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if "parameters" in cell.metadata.get("tags", []):
                for name, value in QUICKER.items():
                    cell.source, replaced = re.subn(rf"^({name}: int) = \d+", rf"\1 = {value}", cell.source, flags=re.M)
                    assert replaced == 1, f"the lesson has no parameter {name}"
    nbformat.write(notebook, folder / LESSON)
    return folder


@pytest.fixture(scope="module")
def lab(browser_path: str, lessons: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab that serves the lesson, with settings and files of its own."""
    home = tmp_path_factory.mktemp("jupyter")
    settings = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(WHOLE_NOTEBOOK), encoding="utf-8")
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    kernels = {"JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={lessons}"]
    log = home / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options, "--LabApp.expose_app_in_browser=True"],
            env=os.environ | folders | kernels,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield wait_for_server(server, home / "runtime", log)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the server and its kernels
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for_server(server: subprocess.Popen[bytes], runtime: Path, log: Path) -> str:
    """Wait until the server answers; return the lesson's address in it."""
    for _ in range(5 * STARTED):
        assert server.poll() is None, log.read_text(encoding="utf-8")
        for path in runtime.glob("jpserver-*.json"):
            try:
                entry = json.loads(path.read_text(encoding="utf-8"))
                urllib.request.urlopen(f"{entry['url']}api/status?token={entry['token']}", timeout=5).close()
            except (OSError, ValueError):  # not listening yet, or the file not written to its end
                continue
            return f"{entry['url']}lab/tree/{LESSON}?token={entry['token']}"
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start in {STARTED} s:\n{log.read_text(encoding='utf-8')}")


def test_a_lesson_runs_in_jupyterlab_and_its_figure_follows_a_slider(browser_path: str, lab: str) -> None:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * REDRAWN)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=BROWSER_OPTIONS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(1000 * STARTED)
        page.goto(lab)
        page.wait_for_function(READY)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_function(SETTLED, timeout=1000 * RAN)
        errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
        assert errors.count() == 0, errors.first.inner_text()
        assert re.search(r"\d", page.locator(".jp-CodeCell .jp-InputPrompt").last.inner_text())

        panel = page.locator(".widget-vbox").filter(has=page.locator("img")).first
        image, readout = panel.locator("img"), panel.locator(".widget-readout").first
        expect(readout).to_have_text(str(QUICKER["layers"]))
        before, address = image.evaluate(PIXELS), image.get_attribute("src")
        panel.locator(".noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        expect(readout).to_have_text(str(QUICKER["layers"] + 1))
        expect(image).not_to_have_attribute("src", address)
        assert image.evaluate(PIXELS) != before
        browser.close()
