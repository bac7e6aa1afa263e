"""What can be known of Binder in a moment; `make binder-check` rehearses all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import binder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "remote",
    [
        "https://github.com/somebody/their-fork",
        "https://github.com/somebody/their-fork.git",
        "https://user:password@github.com/somebody/their-fork.git",
        "git@github.com:somebody/their-fork.git",
        "ssh://git@github.com/somebody/their-fork",
    ],
)
def test_a_fork_on_github_has_an_address_without_its_password(remote):
    address = binder.launch_address(remote)
    assert address == f"https://mybinder.org/v2/gh/somebody/their-fork/HEAD?urlpath=lab/tree/{binder.FIRST}"


def test_a_fork_elsewhere_has_an_address():
    address = binder.launch_address("git@git.example.org:group/part/fork.git")
    assert address.startswith("https://mybinder.org/v2/git/https%3A%2F%2Fgit.example.org%2Fgroup%2Fpart%2Ffork/HEAD?")


@pytest.mark.parametrize("remote", ["", "/srv/fork", "file:///srv/fork", "../fork", "https://localhost/fork"])
def test_a_clone_of_a_folder_is_told_to_publish(remote):
    with pytest.raises(ValueError, match="push to a public repository"):
        binder.launch_address(remote)


def test_the_address_opens_a_lesson_that_exists():
    assert (ROOT / binder.FIRST).is_file()


def test_every_import_of_the_lessons_is_in_binders_environment():
    _, wanted = binder.pip_requirements(ROOT / "binder" / "environment.yml")
    names = {"pyyaml": "yaml", "scikit-learn": "sklearn"}  # of packages that are imported by another name
    provided = {names.get(name, name) for name in (line.partition(">")[0] for line in wanted)} | {"dfqlib", "IPython"}
    modules = {module.partition(".")[0] for module in binder.imported_modules(ROOT / "notebooks")}
    assert modules - provided <= sys.stdlib_module_names


def test_start_hands_over_to_the_command_with_one_thread():
    command = [ROOT / "binder" / "start", "sh", "-c", 'echo "$OMP_NUM_THREADS $1"', "sh", "two words"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1 two words\n"
