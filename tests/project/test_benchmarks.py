"""The benchmarks compare like with like, keep what was measured, go on where they stopped, and say what is missing."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import accuracy
import figures
import harness
import pytest
import run
import scaling
import speed
import steps
import tables
import torch

from dfqlib import quantizer

IDENTITY = {
    "recipe": "express",
    "budget": "quick",
    "case": "cifar10_w4a4",
    "variant": "",
    "judge": "test",
    "threads": 1,
}


def row(seed: int, top1: float, **others: Any) -> dict[str, Any]:
    """A row as accuracy.py writes it; what the identity knows goes into it."""
    known = {"top1": top1, "teacher_top1": 90.0, "difference": top1 - 90.0, "calibrated_top1": 50.0, "images": 100}
    measured = {**known, "seconds": 10.0, "cpu_seconds": 9.0, "peak_gb": 0.5, "device": "a processor", "settings": {}}
    job = {name: others.pop(name, value) for name, value in IDENTITY.items()} | {"seed": seed}
    return {"job": job, **measured, **others}


def measured_speed() -> list[dict[str, Any]]:
    """Three rounds in which another program slows the second to a half."""
    pace = dict.fromkeys(speed.TABLES["fine-tuning"], 1.0) | {speed.NAIVE: 0.8, speed.OURS: 0.9, speed.FAST: 1.6}
    rows = []
    for table, variants in speed.TABLES.items():
        ratios = {name: [pace.get(name, 1.0), pace.get(name, 1.0) / 2, pace.get(name, 1.0)] for name in variants}
        ratios[next(iter(variants))] = [1.0, 1.0, 1.0]
        rates = {name: 300 * pace.get(name, 1.0) for name in variants}
        rows.append({"job": {"table": table, "threads": 1}, "ratios": ratios, "images_per_second": rates})
        rows += [{"job": {"table": table, "variant": name}, "peak_gb": 0.5} for name in variants]
    return rows


def square(job: dict[str, Any], log: Path) -> dict[str, Any]:
    """Something to measure, which also notes that it was; 3 fails."""
    with log.open("a") as file:
        file.write(f"{job['number']} ")
    if job["number"] == 3:
        raise ValueError("three is too many")
    return {"square": job["number"] ** 2, "process": os.getpid()}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which the tables are made."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path / "results"


# The runner


def test_each_job_has_a_process_of_its_own_and_is_not_run_again(tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / "squares.json"
    args = harness.arguments("").parse_args([])

    def measure(numbers: tuple[int, ...], settings: dict[str, Any], args: argparse.Namespace = args) -> int:
        jobs = [({"number": number}, settings) for number in numbers]
        return harness.run_apart(functools.partial(square, log=log), jobs, path, args)

    assert measure((1, 2), {"rounds": 5}) == 0
    rows = harness.rows_of(path)
    assert [(each["job"], each["square"]) for each in rows] == [({"number": 1}, 1), ({"number": 2}, 4)]
    assert len({os.getpid(), *(each["process"] for each in rows)}) == 3
    assert {"command", "commit", "device", "versions", "date"} <= rows[0].keys()
    assert measure((1, 3, 2, 4), {"rounds": 5}) == 1  # 3 fails, 4 is measured all the same
    assert [each["job"]["number"] for each in harness.rows_of(path)] == [1, 2, 4]
    assert log.read_text() == "1 2 3 4 "
    assert measure((1,), {"rounds": 6}) == 0  # other settings
    assert measure((2,), {"rounds": 5}, harness.arguments("").parse_args(["--again"])) == 0
    assert log.read_text() == "1 2 3 4 1 2 "
    assert [each["job"]["number"] for each in harness.rows_of(path)] == [4, 1, 2]


def test_a_setting_that_was_added_since_does_not_make_a_row_another() -> None:
    old = {"job": {"seed": 0}, "settings": {"steps": 400, "spec": {"layers": []}}}
    assert harness.holds(old, ({"seed": 0}, {"steps": 400, "spec": {"layers": (), "new": 1}, "compiled": False}))
    assert not harness.holds(old, ({"seed": 0}, {"steps": 400, "spec": {"layers": (1,)}}))
    assert not harness.holds(old, ({"seed": 0}, {"steps": 800}))
    assert not harness.holds(old, ({"seed": 1}, {"steps": 400}))


def test_the_command_that_a_row_carries_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["some/accuracy.py", "--data", "here", "--seeds", "0", "1", "--output", "there"])
    assert harness.command() == "python benchmarks/accuracy.py --seeds 0 1"


# What is measured


def test_the_naive_quantizer_that_ours_is_timed_against_computes_the_same() -> None:
    each = quantizer.StepQuantizer(4, signed=True)
    values = torch.randn(4, 3, 5, 5)
    each.calibrate(values)
    each.mode = "quantize"
    found = []
    for forward in (each, lambda x: steps.straight_through(each, x)):
        x = values.clone().requires_grad_()
        each.step.grad = None
        out = forward(x)
        out.square().sum().backward()
        found.append((out.detach(), x.grad, each.step.grad))
    for ours, naive in zip(*found, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)


def test_a_ratio_is_the_median_over_rounds() -> None:
    uneven = {"ratios": {"a": [1.0, 4.0, 9.0], "b": [2.0, 1.0, 3.0]}}
    assert speed.against(uneven, "a", "b") == 3.0  # of 0.5, 4 and 3; the ratio of the medians is 2


def test_an_iteration_of_each_kind_runs_and_peak_memory_is_gigabytes() -> None:
    for make in (steps.fine_tuning, steps.synthesis_step):
        make(bf16=False, batch=4)()
    assert 0.05 < harness.peak_gb() < 64
    found = speed.measure({"table": "generator", "threads": 1}, torch.device("cpu"), rounds=1, seconds=0.0)
    assert found["ratios"]["FP32"] == [1.0]
    assert found["images_per_second"].keys() == found["ratios"].keys() == {"FP32", "bf16"}


def test_the_cost_of_each_size_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BATCHES", (2, 4))
    found = scaling.measure({"quantity": "batch", "kind": "fine-tuning"}, steps.CPU, rounds=1)
    assert found["sizes"] == [2.0, 4.0]
    assert all(each > 0 for each in found["seconds"])


def test_a_run_is_kept_with_its_settings_and_found_again(tmp_path: Path) -> None:
    words = ["--case", "digits_w2a2", "--seeds", "0", "--set", "steps=2,images=8,synthesis_steps=1"]
    words += ["--file", "curve", "--output", str(tmp_path)]
    assert accuracy.main(words) == 0
    path = tmp_path / "accuracy_curve.json"
    (found,) = harness.rows_of(path)
    assert found["settings"]["steps"] == 2
    assert found["settings"]["spec"]["granularity"] == "tensor"
    assert found["difference"] == pytest.approx(found["top1"] - found["teacher_top1"])
    before = path.read_bytes()
    assert accuracy.main(words) == 0
    assert path.read_bytes() == before


def test_a_variant_is_read_as_settings() -> None:
    assert accuracy.changes_of("images=512,lr=4e-4,clip=mse") == {"images": 512, "lr": 4e-4, "clip": "mse"}
    assert accuracy.changes_of("") == {}


def test_cases_whose_data_is_missing_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(case=None, data=tmp_path, judge="test")
    assert accuracy.cases_of(args) == ["digits_w2a2", "digits_w3a3"]
    said = capsys.readouterr().err
    assert f"left out, there is no {tmp_path / 'models'}" in said
    assert "cifar10_w4a4, cifar10_w3a3" in said


# What is shown


def test_a_table_without_its_results_names_the_command_that_measures_them(results: Path) -> None:
    for name, command in {
        "speed": "speed.py", "targets": "speed.py", "export": "deploy.py", "lessons": "lessons.py",
        "express": "accuracy.py", "search": "accuracy.py --file search",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match=f"is not there: python benchmarks/{command}"):
            tables.written(f"<!-- results: {name} -->\nold\n<!-- end -->")
    assert tables.written("no table") == "no table"


def test_the_tables_of_speed_show_ratios_against_training_and_against_the_naive_iteration(results: Path) -> None:
    harness.save(results / "speed.json", measured_speed())
    text = tables.written("<!-- results: speed -->\n<!-- end -->\n<!-- results: targets -->\n<!-- end -->")
    head = "| iteration of fine-tuning | img/s, 1 thread | × FP32 training | × naive straight-through | peak memory |"
    assert head in text
    assert "| W4A4 | 270 | 0.90 | 1.12 | 0.50 GB |" in text
    assert "| generator: FP32 | 300 | 1.00 | 0.50 GB |" in text
    assert "| W4A4, bf16, compiled, against W4A4, naive straight-through | 2.00 |" in text


def test_a_table_of_accuracies_shows_the_mean_over_seeds_and_no_run_of_several_threads(results: Path) -> None:
    rows = [row(1, 84.0), row(0, 80.0), row(0, 10.0, threads=2)]
    harness.save(results / "accuracy_express.json", rows)
    assert "| quick | 2 | 50.00 ± 0.00 | **82.00 ± 2.83** | -8.00 ± 2.83 | 9 | 0.50 GB |" in tables.express()


def test_the_gain_of_a_variant_is_paired_by_seed(results: Path) -> None:
    plain = [row(0, 80.0), row(1, 90.0), row(2, 70.0)]
    tried = [row(0, 81.0, variant="lr=1"), row(1, 92.0, variant="lr=1"), row(2, 71.0, variant="lr=2")]
    harness.save(results / "accuracy_search.json", plain + tried)
    assert tables.search().splitlines()[2:] == ["| `lr=1` | +1.50 ± 0.71 |", "| `lr=2` | +1.00 (one run) |"]


def test_the_fit_of_a_straight_line_is_1_and_of_a_parabola_less() -> None:
    sizes = [1.0, 2.0, 3.0, 4.0]
    assert figures.straight_line(sizes, [0.5 + 2 * size for size in sizes]) == pytest.approx((2, 0.5, 1))
    assert figures.straight_line(sizes, [size**2 for size in sizes])[2] < 0.99


def test_figures_are_drawn_from_the_results_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("accuracy_curve", "speed", "scaling"):
        shutil.copy(harness.ROOT / "results" / f"{name}.json", tmp_path)
    assert figures.main(["--results", str(tmp_path), "--output", str(tmp_path / "docs")]) == 0
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["accuracy.png", "scaling.png", "speed.png"]
    assert "overview: left out, there is no results/accuracy_express.json" in capsys.readouterr().err


def test_the_curve_names_what_its_longest_run_reached(tmp_path: Path) -> None:
    rows = [row(0, 89.0, seconds=60.0, variant="steps=9"), row(1, 89.5, seconds=60.0, variant="steps=9")]
    harness.save(tmp_path / "accuracy_curve.json", [*rows, row(0, 88.0, seconds=20.0, variant="steps=1")])
    (axes,) = figures.accuracy(tmp_path).axes
    wanted = "W4A4, per tensor, first and last at 8 bits: -0.8 points from FP32 after 60 s"
    assert wanted in (axes.get_title(), axes.get_title("left"))


# make bench


def test_make_bench_starts_programs_that_exist_and_its_short_form_leaves_the_results_alone() -> None:
    for programs in (run.PROGRAMS, run.SHORT):
        for line in (line for lines in programs.values() for line in lines):
            assert (harness.ROOT / "benchmarks" / line.split()[0]).is_file()
    assert all("--output build/bench" in line for lines in run.SHORT.values() for line in lines)
    with pytest.raises(SystemExit):
        run.main(["sped"])


def test_make_bench_measures_every_row_that_the_tables_show(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def note(measure: object, jobs: list[harness.Job], path: Path, args: argparse.Namespace) -> int:
        asked.update((path.stem, json.dumps(identity, sort_keys=True)) for identity, _ in jobs)
        return 0

    monkeypatch.setattr(accuracy, "run_apart", note)
    monkeypatch.setattr(accuracy, "missing", lambda *_: "")
    for line in (line for name in ("accuracy", "curve") for line in run.PROGRAMS[name]):
        accuracy.main(line.split()[1:])
    shown = [path for path in (harness.ROOT / "results").glob("accuracy_*.json") if path.stem != "accuracy_search"]
    for path in shown:
        for each in harness.rows_of(path):
            assert (path.stem, json.dumps(each["job"], sort_keys=True)) in asked
