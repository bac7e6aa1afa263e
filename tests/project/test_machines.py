"""Machines that lack something or are set up oddly: what is asked for works all the same, or one line says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfqlib.__main__ import main

TINY = [f"--set={name}" for name in ("images=8", "synthesis_steps=2", "steps=2", "batch=4")]
DIGITS = ["quantize", "--arch", "digits_resnet8", "--quiet", *TINY]


def run_apart(*command: object, **variables: str) -> tuple[int, str, list[str]]:
    """Exit code, output and the lines on stderr of Python in a process of its own with other environment variables."""
    arguments = [sys.executable, *map(str, command)]
    environment = {**os.environ, **variables}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.strip()]


def test_compiling_without_a_compiler_warns_in_one_line_and_goes_on(tmp_path: Path) -> None:
    nothing = {"CXX": str(tmp_path / "none"), "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    output = tmp_path / "q.pt"
    code, _, (said,) = run_apart("-m", "dfqlib", *DIGITS, "--set=compiled=true", "--output", output, **nothing)
    assert code == 0
    assert said.startswith("dfqlib: warning: compiled=True: PyTorch cannot compile here, its own kernels are used (")
    assert said.endswith("; install a C++ compiler (Debian, Ubuntu: g++ and python3-dev)")
    assert output.is_file()


@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_NUM_THREADS": "0"},
        {"OMP_NUM_THREADS": "64"},
        {"OMP_NUM_THREADS": "many"},
        {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
        {"ONEDNN_MAX_CPU_ISA": "none"},
    ],
    ids=lambda variables: ",".join("=".join(pair) for pair in variables.items()),
)
def test_odd_numbers_of_threads_and_instruction_sets(variables: dict[str, str], tmp_path: Path) -> None:
    code, said, complaints = run_apart("-m", "dfqlib", *DIGITS, "--output", tmp_path / "q.pt", **variables)
    assert code == 0
    assert "written: " in said
    assert len(set(complaints)) <= 1, complaints  # OpenMP's own: Invalid value for environment variable OMP_NUM_THREADS
    assert all("OMP_NUM_THREADS" in line for line in complaints)


def test_no_more_threads_are_used_than_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert main([*DIGITS, "--output", str(tmp_path / "q.pt"), "--threads", "100000"]) == 0
    assert torch.get_num_threads() == 2
    assert capfd.readouterr().err == "dfqlib: --threads 100000: this machine has 2 cores, 2 threads are used\n"


def test_a_torch_below_the_floor_is_named_with_the_remedy() -> None:
    code, _, said = run_apart("-c", 'import torch; torch.__version__ = "2.5.1+cpu"; import dfqlib')
    assert code == 1
    message = "dfqlib needs torch 2.6 or newer, this is 2.5.1+cpu; pip install -U torch torchvision"
    assert said[-1] == f"dfqlib.errors.InputError: {message}"
    assert [line.split('"')[1] for line in said if line.startswith("  File")][1:] == [sys.modules["dfqlib"].__file__]


def test_a_build_of_the_floor_itself_is_taken() -> None:
    code, _, said = run_apart("-c", 'import torch; torch.__version__ = "2.6.0a0+git1a2b3c"; import dfqlib')
    assert (code, said) == (0, [])
