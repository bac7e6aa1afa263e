"""The loop under every recipe: what it records, where it stops, and that stopping and resuming changes nothing."""

import os
import signal
import tempfile
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfqlib
from dfqlib.errors import InputError, NonFiniteError
from dfqlib.training import Session, session
from dfqlib.training.files import check_writable, written_whole

STEPS = 25


class Run:
    """A small training of two phases, in which every step draws random numbers."""

    def __init__(self, checkpoint: Path | None = None, *, seed: int = 3, kind: str = "w4a4", stop: Any = None) -> None:
        self.session = Session(seed, False, checkpoint, {"spec": kind, "seed": str(seed)})
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        for parameter in self.layers.parameters():
            nn.init.constant_(parameter, 0.1)
        self.stop, self.taken = stop or (lambda phase, step: None), 0

    def __call__(self) -> "Run":
        for layer, phase in zip(self.layers, ("first", "second"), strict=True):
            adam = torch.optim.Adam(layer.parameters(), 0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
            step = partial(self.step, phase, layer, adam, schedule)
            self.session.loop(phase, STEPS, step, {"layer": layer, "optimizer": adam, "schedule": schedule})
        return self

    def step(self, phase: str, layer: nn.Module, adam: Any, schedule: Any, number: int) -> dict[str, Tensor]:
        self.taken += 1
        self.stop(phase, number)
        loss = (layer(torch.randn(8, 4)) - torch.randn(8, 4)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        return {"loss": loss, "twice": 2 * loss}

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.layers.parameters()]


def equal(first: Run, second: Run) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.weights(), second.weights(), strict=True))


def without_time(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def at(phase: str, number: int, what: Any) -> Any:
    return lambda p, n: what() if (p, n) == (phase, number) else None


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def raise_interrupt() -> None:
    raise KeyboardInterrupt


# History and the finite check


def test_history_has_the_mean_losses_of_each_look_at_every_phase() -> None:
    session, seen = Session(progress=False), []

    def step(number: int) -> Mapping[str, Tensor]:
        seen.append(number)
        return {"loss": torch.tensor(float(number)), "half": torch.tensor(number / 2, dtype=torch.float64)}

    session.loop("warm-up", 25, step, {})
    assert seen == list(range(25))
    rows = [(row["phase"], row["step"], row["loss"], row["half"]) for row in session.history]
    assert rows == [("warm-up", 10, 4.5, 2.25), ("warm-up", 20, 14.5, 7.25), ("warm-up", 25, 22.0, 11.0)]
    seconds = [row["seconds"] for row in session.history]
    assert seconds == sorted(seconds)


def test_the_graph_of_a_step_is_gone_before_the_next() -> None:
    class Kept:
        pass

    kept: list[weakref.ref[Kept]] = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = Kept()
            kept.append(weakref.ref(ctx.kept))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0]

    def step(index: int) -> dict[str, Tensor]:
        assert all(reference() is None for reference in kept)
        return {"loss": Node.apply(torch.ones((), requires_grad=True))}

    Session(progress=False).loop("phase", 3, step, {})
    assert len(kept) == 3


def test_a_phase_of_no_steps_does_nothing() -> None:
    session = Session(progress=False)
    session.loop("nothing", 0, lambda _: pytest.fail("a step was taken"), {})
    assert session.history == []


def test_a_phase_may_end_itself_at_a_look_and_is_not_taken_up_again(tmp_path: Path) -> None:
    def step(number: int) -> Mapping[str, Tensor]:
        return {"loss": torch.tensor(float(number))}

    def finished(rows: list[dict[str, Any]]) -> bool:
        return [row["phase"] for row in rows] == ["first", "first"]

    for _ in range(2):  # the second time from the checkpoint
        session = Session(progress=False, resume=tmp_path / "run.pt")
        session.loop("before", 5, step, {})
        session.loop("first", 45, step, {}, finished=finished)
        assert [(row["phase"], row["step"]) for row in session.history] == [("before", 5), ("first", 10), ("first", 20)]


@pytest.mark.parametrize(("bad", "value"), [(0, "nan"), (13, "inf"), (24, "-inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named_with_its_step(bad: int, value: str) -> None:
    session = Session(progress=False)

    def step(number: int) -> Mapping[str, Tensor]:
        return {"loss": torch.tensor(1.0), "bn": torch.tensor(float(value) if number == bad else 0.0)}

    with pytest.raises(NonFiniteError, match=f'synthesis: the loss "bn" became {value} at step {bad};'):
        session.loop("synthesis", 25, step, {})


def test_no_checkpoint_holds_what_a_broken_loss_made(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    broken = Run(path, stop=at("second", 4, lambda: broken.layers[1].weight.data.fill_(torch.nan)))
    with pytest.raises(NonFiniteError):
        broken()
    phases = torch.load(path, weights_only=True)["phases"]
    assert set(phases) == {"first"}


def test_what_the_check_of_a_phase_finds_is_kept_at_every_look() -> None:
    calls: list[int] = []

    def look() -> dict[str, float]:
        calls.append(1)
        return {"conv": len(calls) / 2}

    session = Session(progress=False)
    session.loop("p", 25, lambda n: {"loss": torch.tensor(0.0)}, {}, look)
    assert len(calls) == 3
    assert session.steps == [
        {"phase": "p", "step": step, "conv": value} for step, value in ((10, 0.5), (20, 1.0), (25, 1.5))
    ]


def test_every_phase_has_random_numbers_of_its_own_whatever_came_before() -> None:
    def drawn(session: Session, phase: str) -> float:
        values: list[float] = []

        def step(_: int) -> Mapping[str, Tensor]:
            values.append(float(torch.rand(())))
            return {"loss": torch.tensor(0.0)}

        session.loop(phase, 1, step, {})
        return values[0]

    one, other = Session(0, progress=False), Session(1, progress=False)
    first, second = drawn(one, "a"), drawn(one, "b")
    torch.rand(5)
    assert drawn(Session(0, progress=False), "b") == second
    assert len({first, second, drawn(other, "a")}) == 3


# Ctrl-C


@pytest.mark.parametrize("interrupt", [press_ctrl_c, raise_interrupt])
def test_ctrl_c_keeps_what_is_done_and_skips_the_phases_after_it(interrupt: Any, capfd: Any) -> None:
    run = Run(stop=at("first", 12, interrupt))()
    assert run.session.interrupted
    assert run.taken == 13
    untouched = Run().weights()[2:]
    assert all(torch.equal(a, b) for a, b in zip(run.weights()[2:], untouched, strict=True))
    # A signal waits for its step to end; an exception from within the step cannot.
    done = 13 if interrupt is press_ctrl_c else 12
    assert f"first: interrupted after {done} of 25 steps" in capfd.readouterr().err
    if interrupt is press_ctrl_c:
        assert run.session.history[-1]["step"] == 13
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait_for_the_step() -> None:
    reached: list[str] = []

    def twice() -> None:
        press_ctrl_c()
        reached.append("once")
        press_ctrl_c()
        reached.append("twice")

    run = Run(stop=at("first", 2, twice))()
    assert run.session.interrupted
    assert reached == ["once"]


def test_a_thread_and_a_handler_of_somebody_else_are_left_alone() -> None:
    thread = threading.Thread(target=Run())
    thread.start()
    thread.join()
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        run = Run(stop=at("first", 2, press_ctrl_c))()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert pressed == [1]
    assert not run.session.interrupted


# Checkpoint and resume


@pytest.mark.parametrize("phase", ["first", "second"])
@pytest.mark.parametrize("number", [0, 9, 13, 24])
def test_a_run_resumed_after_ctrl_c_equals_an_unbroken_one_bit_for_bit(phase: str, number: int, tmp_path: Path) -> None:
    unbroken = Run()()
    interrupted = Run(tmp_path / "run.pt", stop=at(phase, number, press_ctrl_c))()
    assert interrupted.session.interrupted
    torch.rand(7)
    resumed = Run(tmp_path / "run.pt")()
    assert equal(resumed, unbroken)
    assert resumed.taken == 2 * STEPS - interrupted.taken
    assert not resumed.session.interrupted


def test_a_run_that_was_killed_goes_on_from_its_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SAVE_EVERY", 0.0)

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    unbroken = Run()()
    with pytest.raises(Killed):
        Run(tmp_path / "run.pt", stop=at("second", 17, kill))()
    resumed = Run(tmp_path / "run.pt")()
    assert equal(resumed, unbroken)
    assert resumed.taken == 15
    assert without_time(resumed.session.history) == without_time(unbroken.session.history)
    seconds = [row["seconds"] for row in resumed.session.history]
    assert seconds == sorted(seconds)


def test_resuming_a_finished_run_takes_no_step(tmp_path: Path) -> None:
    finished = Run(tmp_path / "run.pt")()
    again = Run(tmp_path / "run.pt")()
    assert again.taken == 0
    assert equal(again, finished)
    assert again.session.history == finished.session.history


def test_a_checkpoint_of_other_settings_is_refused_and_the_settings_named(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Run(path)()
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"is of a run with spec=w4a4, now spec=w3a3; repeat its settings"):
        Run(path, kind="w3a3")
    with pytest.raises(InputError, match="with seed=3, now seed=4;"):
        Run(path, seed=4)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    tiny: dict[str, Any] = {
        "progress": False, "checkpoint": path, "images": 4, "synthesis_steps": 1, "steps": 1, "batch": 2,
    }  # fmt: skip
    teacher = dfqlib.load_model("digits_resnet8")
    dfqlib.quantize(teacher, (1, 16, 16), **tiny)
    with torch.no_grad():
        next(teacher.parameters()).mul_(1.01)
    with pytest.raises(InputError, match=r"run with model='ResNet8 \w{12}', now model='ResNet8 \w{12}';"):
        dfqlib.quantize(teacher, (1, 16, 16), **tiny)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"not a checkpoint"])
def test_a_corrupted_checkpoint_is_refused_and_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not the resume file of a dfqlib run; name another file or remove it"):
        Run(path)
    assert path.read_bytes() == content


def test_half_a_checkpoint_and_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Run(path)()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="is not the resume file"):
        Run(path)
    for content in ({"weight": torch.ones(2)}, [1, 2], nn.Linear(2, 2)):
        torch.save(content, path)
        with pytest.raises(InputError, match="is not the resume file"):
            Run(path)


def test_a_checkpoint_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Run(path)()
    content = torch.load(path, weights_only=True)
    del content["phases"]["first"]["state"]["layer"]["weight"]
    torch.save(content, path)
    with pytest.raises(InputError, match="what it holds of first does not fit this run"):
        Run(path)()


# Files


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write(text: str, error: type[BaseException] | None = None) -> None:
        with written_whole(path) as temporary:
            temporary.write_text(text)
            assert path.read_text() == "before"
            if error is not None:
                raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            write("half", error)
        assert path.read_text() == "before"
    write("after")
    assert path.read_text() == "after"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "q.pt", "output")
    assert list(tmp_path.iterdir()) == []
    for path, message in (
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "none" / "q.pt", "the folder .*none does not exist; create it first"),
        (Path(os.devnull), "no ordinary file"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(path, "output")

    def denied(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\); name another place"):
        check_writable(tmp_path / "q.pt", "output")
