"""The benchmarks compare like with like, keep what was measured, and say what is missing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import accuracy
import curve
import harness
import pytest
import run
import scaling
import speed
import steps
import tables
import torch
from accuracy import Job

from dfqlib import quantizer
from dfqlib.recipes import calibrate

POINT = "steps=2,images=8,synthesis_steps=1"
MEASURE = ("--case", "digits_w2a2", "--jobs", "1", "--threads", "1")


def row(seed: int, top1: float, **others: Any) -> dict[str, Any]:
    """A run as a results file has it."""
    known = {"top1": top1, "teacher_top1": 90.0, "difference": top1 - 90.0, "calibrated_top1": 50.0, "images": 100}
    return {**known, "seconds": 10.0, "peak_gb": 0.5, "settings": {"seed": seed}, **others}


def entry(rows: list[dict[str, Any]], variant: str = "", bits: str = "w4a4") -> dict[str, Any]:
    """A case as a results file has it."""
    case = {"network": "cifar10_resnet20", "bits": bits, "protocol": "first and last at 8 bits"}
    known = {"case": case, "variant": variant, "device": "CPU, 1 thread of it"}
    return {**known, "summary": accuracy.summary(rows), "runs": rows}


def measured_speed() -> dict[str, Any]:
    """Three rounds in which a neighbour slows the second to a half."""
    pace = {speed.FLOAT: 1.0, speed.NAIVE: 0.8, speed.OURS: 0.9, speed.FAST: 1.6}
    fine_tuning = {
        name: {"images_per_second": 300 * ratio, "ratio": ratio, "ratios": [ratio, ratio / 2, ratio], "peak_gb": 0.5}
        for name, ratio in pace.items()
    }
    fine_tuning[speed.FLOAT]["ratios"] = [1.0, 1.0, 1.0]
    making = {"FP32": {"images_per_second": 90.0, "ratio": 1.0, "ratios": [1.0] * 3, "peak_gb": 0.7}}
    by_threads = {"1": {"fine-tuning": fine_tuning, "generator": making}}
    return {"targets": speed.reached(by_threads), "threads": by_threads}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which the tables are made."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path / "results"


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


def test_a_ratio_is_the_median_over_rounds_and_each_that_was_asked_for_is_there() -> None:
    by_threads = measured_speed()["threads"]
    targets = {(each["way"], each["against"]): each for each in speed.reached(by_threads)}
    assert {key: each["asked"] for key, each in targets.items()} == {
        (speed.OURS, speed.FLOAT): 0.85,
        (speed.FAST, speed.FLOAT): 1.4,
        (speed.OURS, speed.NAIVE): 1.15,
        (speed.FAST, speed.NAIVE): 1.9,
    }
    assert targets[speed.FAST, speed.NAIVE]["measured"] == {"1": pytest.approx(2.0)}
    uneven = {"a": {"ratios": [1.0, 4.0, 9.0]}, "b": {"ratios": [2.0, 1.0, 3.0]}}
    assert harness.against(uneven, "a", "b") == 3.0  # of 0.5, 4 and 3; the ratio of the medians is 2


def test_a_step_of_each_kind_runs_and_peak_memory_is_gigabytes() -> None:
    for make in (steps.fine_tuning, steps.synthesis_step):
        make(bf16=False, batch=4)()
    assert 0.05 < harness.peak_gb() < 64


def test_the_fit_of_a_straight_line_is_1_and_of_a_parabola_less() -> None:
    sizes = [1.0, 2.0, 3.0, 4.0]
    fit = scaling.line(sizes, [0.5 + 2 * size for size in sizes])
    assert fit == {"slope": pytest.approx(2), "intercept": pytest.approx(0.5), "r2": pytest.approx(1)}
    assert scaling.line(sizes, [size**2 for size in sizes])["r2"] < 0.99


def test_the_curve_has_a_line_per_widths_and_the_quickest_point_first() -> None:
    cases = {
        "late": entry([row(0, 89.0, seconds=60.0), row(1, 89.5, seconds=60.0)]),
        "soon": entry([row(0, 88.0, seconds=20.0)]),
        "other": entry([row(0, 80.0)], bits="w3a3"),
    }
    found = curve.lines(cases)
    assert list(found) == ["W4A4, first and last at 8 bits", "W3A3, first and last at 8 bits"]
    assert found["W4A4, first and last at 8 bits"] == [
        (20.0, -2.0, 0.0),
        (60.0, -0.75, pytest.approx(0.3536, abs=1e-4)),
    ]
    assert curve.title(found) == "W4A4, first and last at 8 bits: -0.8 points from FP32 after 60 s"
    assert curve.draw(cases).startswith(b"\x89PNG")


def test_a_table_without_its_results_names_the_command_that_measures_them(results: Path) -> None:
    for name, command in {
        "speed": "speed.py", "targets": "speed.py", "export": "deploy.py", "ideas": "accuracy.py",
        "express": "accuracy.py --recipe express",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match=f"is not there: python benchmarks/{command} measures it"):
            tables.written(f"<!-- results: {name} -->\nold\n<!-- end -->")
    assert tables.written("no table") == "no table"


def test_the_tables_of_speed_show_ratios_against_training_and_against_the_naive_step(results: Path) -> None:
    harness.save(results / "speed.json", measured_speed())
    text = tables.written("<!-- results: speed -->\n<!-- end -->\n<!-- results: targets -->\n<!-- end -->")
    head = "| step of fine-tuning | img/s, 1 thread | × FP32 training | × naive straight-through | peak memory |"
    assert head in text
    assert "| W4A4 | 270 | 0.90 | 1.12 | 0.50 GB |" in text
    assert "| generator: FP32 | 90 | 1.00 | 0.70 GB |" in text
    assert "| W4A4, bf16, compiled, against W4A4, naive straight-through | 2.00 |" in text


def test_the_gain_of_an_idea_is_paired_by_seed(results: Path) -> None:
    plain = entry([row(0, 80.0), row(1, 90.0), row(2, 70.0)])
    ideas = {
        "cifar10_w4a4:mix": entry([row(0, 81.0), row(1, 92.0)], "mix"),
        "cifar10_w4a4:one": entry([row(2, 71.0)], "one"),
    }
    harness.save(results / "accuracy_express.json", {"cases": {"cifar10_w4a4": plain, **ideas}})
    assert tables.ideas().splitlines()[2:] == ["| mix | +1.50 ± 0.71 |  |", "| one | +1.00 (one run) |  |"]


def test_cases_whose_data_is_missing_are_left_out_and_refused_when_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = accuracy.parse(["--data", str(tmp_path)])
    assert args.case == ["digits_w2a2", "digits_w3a3", "digits_w2a2_short"]
    assert "cifar10_w4a4: left out, there is no " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        accuracy.parse(["--data", str(tmp_path), "--case", "digits_w2a2", "cifar10_w4a4"])
    with pytest.raises(SystemExit):
        accuracy.parse(["--recipe", "gdfq", "--curve"])
    with pytest.raises(SystemExit):
        accuracy.parse(["--recipe", "calibrate", "--images", "kept", "--set", "images=9", "--variant", "few"])


def test_rows_measured_before_are_kept_and_only_missing_ones_asked_for(tmp_path: Path) -> None:
    args = accuracy.parse([*MEASURE, "--missing", "--seeds", "0", "1", "--output", str(tmp_path)])
    job = Job("express", "digits_w2a2", 0)
    accuracy.record(job, args, row(0, 80.0))  # as the first results were kept, without processor time
    assert accuracy.jobs_of(args) == [Job("express", "digits_w2a2", 1)]
    found = accuracy.record(accuracy.jobs_of(args)[0], args, row(1, 84.0, cpu_seconds=9.0))
    assert (found["top1"], found["cpu_seconds"], found["seeds"]) == (82.0, 9.0, [0, 1])
    assert accuracy.jobs_of(args) == []
    kept = json.loads((tmp_path / "results" / "accuracy_express.json").read_text())["cases"]["digits_w2a2"]
    assert "--case digits_w2a2 --seeds 0 1" in kept["command"]


def test_each_point_of_a_curve_is_a_run_of_its_own_apart_from_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*MEASURE, "--seeds", "0", "--missing", "--output", str(tmp_path), "--curve"]
    assert [job.changes for job in accuracy.jobs_of(accuracy.parse([*command, "steps=1,images=8", "steps=2"]))] == [
        ("steps=1", "images=8"),
        ("steps=2",),
    ]
    monkeypatch.setattr("sys.argv", ["accuracy.py", *command, POINT])
    assert accuracy.main() == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["accuracy_curve.json"]
    cases = json.loads((tmp_path / "results" / "accuracy_curve.json").read_text())["cases"]
    assert list(cases) == [f"digits_w2a2:{POINT}"]
    (found,) = cases[f"digits_w2a2:{POINT}"]["runs"]
    assert found["settings"]["steps"] == 2
    assert {"seconds", "cpu_seconds", "top1", "difference"} <= set(found)
    assert cases[f"digits_w2a2:{POINT}"]["command"].endswith(f"--curve {POINT}")
    assert (tmp_path / "docs" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert accuracy.main() == 0  # all are there
    assert capsys.readouterr().out == ""


def test_kept_images_change_nothing_but_who_pays_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibrate.BUDGETS, "quick", calibrate.Settings(images=16, synthesis_steps=4))
    job = Job("calibrate", "digits_w2a2", 0, ("clip=aciq",), "aciq")
    known = {"threads": 1, "data": tmp_path, "budget": "quick"}
    plain = accuracy.measure(job, argparse.Namespace(**known, images=None))
    folder = tmp_path / "kept"
    first, again = (accuracy.measure(job, argparse.Namespace(**known, images=folder)) for _ in range(2))
    for name in ("top1", "difference", "calibrated_top1"):
        assert plain[name] == first[name] == again[name]
    (kept,) = folder.iterdir()
    making = torch.load(kept)["cost"]["cpu_seconds"]
    assert min(first["cpu_seconds"], again["cpu_seconds"]) > making > 0


def test_make_bench_starts_programs_that_exist_and_its_short_form_leaves_the_results_alone() -> None:
    for name, benchmark in run.BENCHMARKS.items():
        full = run.command(benchmark, short=False, missing=True)
        assert full is not None
        assert Path(full[1]).is_file()
        assert ("--missing" in full) == (name in ("accuracy", "curve"))
        short = run.command(benchmark, short=True, missing=False)
        assert (short is None) == (name in ("deploy", "overview", "tables"))
        if short is not None:
            assert short[-2:] == ["--output", str(run.ROOT / "build" / "bench")]


def test_make_bench_leaves_out_what_has_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "DATA", tmp_path)
    assert run.main(["deploy"]) == 0
    assert f"deploy: left out, there is no {tmp_path / 'models'}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["sped"])
