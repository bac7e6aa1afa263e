"""What a newcomer types works, and the files that say the same thing in several places agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import lowest
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dfqlib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(*extras: str) -> list[Requirement]:
    """The core dependencies and those of the named extras."""
    optional = PROJECT["optional-dependencies"]
    return [Requirement(line) for line in PROJECT["dependencies"] + [r for name in extras for r in optional[name]]]


def pins() -> dict[str, str]:
    """Name to version, of every line in constraints.txt."""
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# Environments


def test_binder_gets_the_same_environment():
    assert read("binder/environment.yml") == read("environment.yml")
    assert not (ROOT / "binder" / "environment.yml").is_symlink()


def test_conda_and_pip_ask_for_the_same_ranges():
    asked = yaml.safe_load(read("environment.yml"))["dependencies"]
    conda = {line for line in asked if not re.match(r"(python|pip)\b", line)}
    wanted = requirements("notebooks", "export")
    assert conda == {f"{CONDA_NAMES.get(wish.name, wish.name)}{wish.specifier}" for wish in wanted}


def test_the_conda_environments_python_is_one_we_support():
    asked = yaml.safe_load(read("environment.yml"))["dependencies"]
    (python,) = [line.partition("=")[2] for line in asked if line.startswith("python=")]
    assert python in Requirement(f"python{PROJECT['requires-python']}").specifier


@pytest.mark.parametrize("wish", requirements(*PROJECT["optional-dependencies"]), ids=str)
def test_each_requirement_has_a_tested_pin_within_its_range(wish):
    assert pins()[canonicalize_name(wish.name)] in wish.specifier


def test_pins_hold_for_every_build_of_a_version():
    assert not [f"{name}=={version}" for name, version in pins().items() if Version(version).local]


def test_make_installs_every_extra():
    lists = re.findall(r"^(?:MORE_)?EXTRAS := (.+)$", read("Makefile"), re.M)
    assert {extra for line in lists for extra in line.split(",")} == set(PROJECT["optional-dependencies"])


def test_every_extra_that_the_unit_tests_need_is_tried_at_its_floors():
    (extras,) = re.findall(r"^UNIT_EXTRAS := (.+)$", read("Makefile"), re.M)
    wanted = requirements(*extras.split(","))
    assert {f"{wish.name}{wish.specifier}".replace(">=", "==") for wish in wanted} == set(
        lowest.lowest(PROJECT, extras.split(","))
    )
    assert {"notebooks", "export", "test"} == set(extras.split(","))


@pytest.mark.parametrize("line", ["torch", "torch>=2.6,<3", "torch==2.6", 'torch>=2.6; python_version < "3.12"'])
def test_a_requirement_without_a_plain_floor_is_refused(line):
    with pytest.raises(ValueError, match="must be name>=version"):
        lowest.lowest({"dependencies": [line]}, [])


def test_the_floor_of_torch_stands_in_the_package_too():
    (torch,) = [wish for wish in requirements() if wish.name == "torch"]
    assert str(torch.specifier) == f">={'.'.join(map(str, dfqlib._TORCH_FLOOR))}"


def test_continuous_integration_tries_pythons_that_we_support():
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["run"]["strategy"]["matrix"]["include"]
    pythons = {job["python"] for job in jobs}
    assert all(python in Requirement(f"python{PROJECT['requires-python']}").specifier for python in pythons)
    assert PROJECT["requires-python"].removeprefix(">=") in pythons


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent for path in (ROOT / "dfqlib").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


# Commands

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/usage.md", "notebooks/README.md", "results/README.md")


@pytest.mark.parametrize("script", ["binder/postBuild", "binder/start", ".ci/run"])
def test_scripts_are_executable_and_stop_at_the_first_error(script):
    assert os.access(ROOT / script, os.X_OK)
    assert re.search(r"^set -e", read(script), re.M)


def test_continuous_integration_runs_the_readmes_test_command():
    assert re.search(r"^make test\b", read("README.md"), re.M)
    assert re.search(r"^exec make test\b", read(".ci/run"), re.M)
    assert ".ci/run" in read(".github/workflows/ci.yml")


def test_every_make_command_of_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    assert {"tutorial", "test", "lab"} <= set(re.findall(r"\bmake ([a-z-]+)", read("README.md")))
    for document in DOCUMENTS:
        commands = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", read(document), re.M)
        assert {first or second for first, second in commands} <= targets, document


def test_every_install_command_of_the_documents_names_extras_that_exist():
    for document in DOCUMENTS:
        for extras in re.findall(r"\.\[([a-z,]+)\]", read(document)):
            assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys(), document


# Hygiene


def test_no_tracked_file_names_a_machine_or_a_package_registry():
    places = re.compile(r"/(?:home|Users|root|tmp)/\w|\bpypi\.org|python(?:hosted)|anaconda\.(?:org|com)\b")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in places.finditer(text)]
    assert not found


def test_the_citation_names_four_papers_and_this_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert len(citation["references"]) == 4
    assert all(paper["authors"] and paper["year"] and paper["url"] for paper in citation["references"])


def test_importing_the_package_does_no_work():
    """Nothing heavy besides torch, no network, no process, no file written or folder made."""
    code = """
        import sys
        import torch

        def watch(event, arguments):
            if event == "open":
                mode, flags = arguments[1], arguments[2]
                writes = any(letter in mode for letter in "wax+") if mode else flags & 0b11
                if writes:
                    raise SystemExit(f"wrote {arguments[0]}")
            elif event.startswith(("socket.", "subprocess.", "urllib.", "os.mkdir", "os.rename")):
                raise SystemExit(f"{event} {arguments}")

        sys.addaudithook(watch)
        import dfqlib

        heavy = {"IPython", "ipywidgets", "matplotlib", "onnx", "onnxruntime", "pandas", "sklearn"}
        loaded = (heavy | {"torchvision"}) & sys.modules.keys()
        assert not loaded, loaded
    """
    command = [sys.executable, "-B", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
