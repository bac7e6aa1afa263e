"""The front page shows each lesson as it is, launches what its owner hosts, and links to what exists."""

import importlib
import importlib.util
import io
import json
import re
from html import unescape
from pathlib import Path

import badges
import pytest
import thumbnails
from PIL import Image

import dfqlib

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
PAGES = ("README.md", "CONTRIBUTING.md", "notebooks/README.md", "results/README.md", "docs/usage.md")


def test_pictures_and_tables_of_the_lessons_are_not_older_than_the_lessons() -> None:
    assert list(thumbnails.LESSONS) == LESSONS
    assert list(thumbnails.outdated()) == []
    assert json.loads(thumbnails.DIGESTS.read_text()).keys() == set(LESSONS)


@pytest.mark.parametrize("name", LESSONS)
def test_a_thumbnail_is_small_and_described(name: str) -> None:
    path = thumbnails.FOLDER / f"{name}.png"
    assert path.stat().st_size <= thumbnails.LARGEST
    assert Image.open(path).size == thumbnails.SIZE
    shows = thumbnails.LESSONS[name].shows
    for page, mark in (("README.md", f'{name}.png" alt="{shows}"'), ("notebooks/README.md", f"![{shows}](")):
        assert mark in (ROOT / page).read_text(encoding="utf-8")


def test_another_figure_in_a_lesson_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    Image.new("RGB", (640, 320), "white").save(content, format="PNG")
    monkeypatch.setattr(thumbnails, "figure_of", lambda name: content.getvalue())
    assert len(list(thumbnails.outdated())) == len(LESSONS)


def test_committed_badges_are_of_one_repository_or_of_none() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- badges -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    owner = re.search(r"mybinder\.org/v2/gh/([^/]+/[^/]+)/HEAD", block)
    assert block == (badges.badges(owner[1]) if owner else badges.CLEARED)
    assert not re.search(r"mybinder\.org/v2|colab\.research", text.replace(block, ""))


def test_badges_launch_the_repository_that_is_named_and_can_be_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    readme.write_text(before, encoding="utf-8")
    monkeypatch.setattr(badges, "README", readme)
    assert badges.main(["somebody/their-fork"]) == 0
    filled = readme.read_text(encoding="utf-8")
    assert "https://mybinder.org/v2/gh/somebody/their-fork/HEAD?urlpath=lab/tree/notebooks/01_" in filled
    assert "https://colab.research.google.com/github/somebody/their-fork/blob/main/notebooks/01_" in filled
    assert badges.main(["git@github.com:other/fork.git"]) == 0
    assert "somebody" not in readme.read_text(encoding="utf-8")
    assert badges.main(["--clear"]) == 0
    assert badges.CLEARED in readme.read_text(encoding="utf-8")
    assert badges.main(["/srv/fork"]) == 1


def test_a_repository_elsewhere_has_no_badge_of_colab() -> None:
    found = badges.badges("https://git.example.org/group/fork")
    assert "mybinder.org/v2/git/" in found
    assert "colab" not in found


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)", text) + [
        unescape(link) for link in re.findall(r'(?:href|src)="([^"#]+)"', text)
    ]
    missing = [link for link in links if "//" not in link and not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_library_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`(dfqlib(?:\.[A-Za-z_]+)+)[`(]", text):
        value: object = dfqlib
        for part in name.split(".")[1:]:
            value = getattr(value, part)
    for module, imported in re.findall(r"`from (dfqlib[\w.]*) import (\w+)`", text):
        assert importlib.util.find_spec(f"{module}.{imported}") or hasattr(importlib.import_module(module), imported)
