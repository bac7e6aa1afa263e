"""The site is built without a warning, without the network, and shows what the lessons show."""

from __future__ import annotations

import html
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

import dfqlib

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
NO_NETWORK = """
import socket, sys

def refuse(*_):
    raise OSError("the site must be built without the network")

socket.socket.connect = refuse
import website

sys.exit(website.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("sphinx", reason='no Sphinx: pip install -c constraints.txt -e ".[site]", or make site')
    output = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-c", NO_NETWORK, "--strict", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT / "tools", capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def references(page: Path) -> Iterator[str]:
    """Everything that a page links to or loads."""
    for link in re.findall(r'\b(?:href|src)="([^"]*)"', page.read_text(encoding="utf-8")):
        yield html.unescape(link)


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"([^\"]*)\"", text)
        assert not [link for link in loaded if "//" in link.split("?")[0]], page.relative_to(site)


def test_every_link_within_the_site_leads_somewhere(site):
    broken = []
    for page in site.rglob("*.html"):
        for link in references(page):
            path = unquote(link.split("#")[0].split("?")[0])
            if path and "//" not in path and not path.startswith(("data:", "mailto:", "javascript:")):
                broken += [] if (page.parent / path).exists() else [f"{page.relative_to(site)}: {link}"]
    assert not broken


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_lesson_has_a_page_with_all_of_its_pictures(site, path):
    page = site / "lessons" / path.relative_to(ROOT / "notebooks").with_suffix(".html")
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    shown = [link for link in references(page) if "/_images/" in link]
    assert len(shown) == sum("image/png" in data for data in outputs)
    text = page.read_text(encoding="utf-8")
    assert "VBox(" not in text
    assert "IPython.core.display" not in text
    assert text.count("<summary>") >= sum(cell.source.count("<summary>") for cell in cells)


def test_the_front_page_asks_each_lessons_question(site):
    front = (site / "index.html").read_text(encoding="utf-8")
    for path in LESSONS:
        if path.parent == ROOT / "notebooks":
            assert f'href="lessons/{path.stem}.html"' in front
            assert nbformat.read(path, as_version=4).cells[0].source.partition("\n")[0][2:] in front
    assert "<td><p></p></td>" not in front


def test_search_finds_words_of_lessons_and_names_of_the_library(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert "lessons/01_toy_boundary_matching" in index
    assert "bn_l2_loss" in index


def test_docstrings_lead_to_their_lessons(site):
    page = (site / "api" / "generated" / "dfqlib.lessons.toy.html").read_text(encoding="utf-8")
    assert 'href="../../lessons/01_toy_boundary_matching.html"' in page


def test_the_reference_lists_every_public_module():
    """Packages that offer their names themselves as a whole, others module by module; none hidden by a function."""
    listed = re.findall(r"^   (dfqlib[\w.]*)$", (ROOT / "docs" / "api" / "index.rst").read_text(), re.M)
    assert len(listed) == len(set(listed))
    by_module = ("network", "evaluation", "posttraining", "training", "recipes", "lessons")
    public = {module.name for module in pkgutil.iter_modules(dfqlib.__path__, "dfqlib.")}
    for room in by_module:
        package = importlib.import_module(f"dfqlib.{room}")
        public |= {module.name for module in pkgutil.iter_modules(package.__path__, f"dfqlib.{room}.")}
    rooms = {f"dfqlib.{room}" for room in ("network", "evaluation", "posttraining", "deploy")}
    inner = {"dfqlib.assets", "dfqlib.cli", "dfqlib.__main__", "dfqlib.lessons.subject"}
    assert {name for name in public if "._" not in name} - rooms - inner <= set(listed)
    for name in listed:
        parent, _, leaf = name.rpartition(".")
        module = importlib.import_module(name)
        assert not parent or getattr(sys.modules[parent], leaf) is module, f"{name} is hidden by something else"
