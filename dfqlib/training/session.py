"""The loop of every phase of every recipe: progress, history, Ctrl-C, saving and resuming.

A phase calls a step function a number of times. The step returns its losses as scalar tensors; the loop records them,
stops at the first one that is not finite, and saves or restores whatever has a ``state_dict``.

Taught in notebook 07.
"""

import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfqlib.errors import InputError, NonFiniteError
from dfqlib.training.files import check_writable, written_whole

LOG_EVERY = 10
"""Steps between two rows of the history: reading the losses waits for the device to finish."""
SAVE_EVERY = 30.0
"""Seconds between two savings of the resume file."""


class Stateful(Protocol):
    """Anything that can be saved and restored: a module, an optimizer, a scheduler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


Step = Callable[[int], Mapping[str, Tensor]]


@dataclass
class Session:
    """One run of a recipe: its seed, its history and, if wanted, its resume file.

    Attributes:
        seed: each phase is seeded by it and the phase's name, so that a resumed run equals an unbroken one.
        progress: show a bar per phase.
        resume: the resume file; None saves nothing.
        identity: the run's settings by name; a resume file with other ones is refused.
        history: a row every ``LOG_EVERY`` steps, ``{"phase", "step", "seconds", <loss>: value, ...}``.
        steps: likewise what ``check`` returned, ``{"phase", "step", <quantizer>: step size, ...}``.
        interrupted: Ctrl-C ended a phase early; later phases are skipped and the results so far are kept.

    Taught in notebook 07.
    """

    seed: int = 0
    progress: bool = True
    resume: Path | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    _phases: dict[str, Any] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.resume is None:
            return
        check_writable(self.resume, "resume")
        if self.resume.exists():
            self._resume(self.resume)

    def reseed(self, purpose: str) -> int:
        """Seed PyTorch for one purpose within the run, such as a phase; returns the seed.

        Runs with different seeds, and different purposes of one run, have independent random numbers.
        """
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        stream = int.from_bytes(digest[:7], "big")
        torch.manual_seed(stream)
        return stream

    def loop(
        self,
        phase: str,
        steps: int,
        step: Step,
        state: Mapping[str, Stateful],
        check: Callable[[], Mapping[str, float]] | None = None,
        finished: Callable[[list[dict[str, Any]]], bool] | None = None,
    ) -> None:
        """Call ``step(i)`` for i = 0 ... steps - 1, continuing from the resume file.

        Ctrl-C waits for the current step to end, so that a whole state is kept and saved; a second one does not wait.

        Args:
            phase: name in the history and the resume file, unique within the run.
            steps: number of steps.
            step: does one step and returns its losses, scalar tensors by name.
            state: what the resume file must hold of the phase.
            check: called for every row of the history; raises for failures other than a non-finite loss, returns a row
                of ``steps``.
            finished: called with the phase's rows of the history after each; True ends the phase early.

        Raises:
            NonFiniteError: a loss became NaN or infinite; names the phase, the loss and the step.
        """
        if self.interrupted:
            return
        self.reseed(phase)
        first = self._restore(phase, state)
        saved, done = time.perf_counter(), first
        pending: list[Mapping[str, Tensor]] = []
        shown = {"desc": phase, "disable": not self.progress, "leave": False}
        bar = tqdm(range(first, steps), initial=first, total=steps, **shown)
        with _held_interrupt() as interrupt, bar:
            try:
                for index in bar:
                    # Without their graphs, which would keep the tensors of all steps since the last row in memory.
                    pending.append({name: value.detach() for name, value in step(index).items()})
                    done = index + 1
                    if done % LOG_EVERY == 0 or done == steps or interrupt.is_set():
                        bar.set_postfix(self._log(phase, done, pending))
                        if check is not None and (found := check()):
                            self.steps.append({"phase": phase, "step": done, **found})
                        pending = []
                        if self.resume and time.perf_counter() - saved > SAVE_EVERY and done < steps:
                            self._save(phase, done, state)
                            saved = time.perf_counter()
                    if interrupt.is_set():
                        raise KeyboardInterrupt
                    if finished is not None and not pending and finished(self._rows(phase)):
                        done = steps
                        break
            except KeyboardInterrupt:
                self.interrupted = True
                tqdm.write(f"{phase}: interrupted after {done} of {steps} steps; keeping what is done", sys.stderr)
            self._save(phase, done, state)

    def _log(self, phase: str, done: int, pending: list[Mapping[str, Tensor]]) -> dict[str, str]:
        names = list(pending[-1])
        values = torch.stack([torch.stack([losses[name].detach().float() for name in names]) for losses in pending])
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise NonFiniteError(
                f'{phase}: the loss "{names[column]}" became {float(values[row, column])} at step '
                f"{done - len(pending) + row}; lower the learning rate or check the teacher's outputs"
            )
        means = dict(zip(names, values.mean(0).tolist(), strict=True))
        seconds = round(time.perf_counter() - self._started, 3)
        self.history.append({"phase": phase, "step": done, "seconds": seconds, **means})
        return {name: f"{value:.3g}" for name, value in means.items()}

    def _rows(self, phase: str) -> list[dict[str, Any]]:
        return [row for row in self.history if row["phase"] == phase]

    def _restore(self, phase: str, state: Mapping[str, Stateful]) -> int:
        if phase not in self._phases:
            return 0
        saved = self._phases[phase]
        try:
            for name, item in state.items():
                item.load_state_dict(saved["state"][name])
            torch.set_rng_state(saved["rng"])
            return int(saved["step"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"resume={self.resume}: what it holds of {phase} does not fit this run; name another file"
            ) from error

    def _save(self, phase: str, step: int, state: Mapping[str, Stateful]) -> None:
        if self.resume is None:
            return
        states = {name: item.state_dict() for name, item in state.items()}
        self._phases[phase] = {"step": step, "state": states, "rng": torch.get_rng_state()}
        content: dict[str, Any] = {"identity": dict(self.identity), "phases": self._phases}
        content |= {"history": self.history, "steps": self.steps}
        with written_whole(self.resume) as temporary:
            torch.save(content, temporary)

    def _resume(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            identity, phases = dict(content["identity"]), dict(content["phases"])
            history, steps = list(content["history"]), list(content["steps"])
            earlier = history[-1]["seconds"] if history else 0.0
        except Exception as error:
            raise InputError(
                f"resume={path} is not the resume file of a dfqlib run; name another file or remove it"
            ) from error
        changed = [name for name in {**identity, **self.identity} if identity.get(name) != self.identity.get(name)]
        if changed:
            theirs, ours = (", ".join(f"{n}={run.get(n)}" for n in changed) for run in (identity, self.identity))
            raise InputError(
                f"resume={path} is of a run with {theirs}, now {ours}; repeat its settings or name another file"
            )
        self._phases, self.history, self.steps = phases, history, steps
        self._started -= earlier


@contextmanager
def _held_interrupt() -> Iterator[threading.Event]:
    """Note the first Ctrl-C in an event instead of interrupting a step; the second one raises."""
    interrupt = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt  # another handler decides what Ctrl-C does
        return

    def note(*_: Any) -> None:
        if interrupt.is_set():
            raise KeyboardInterrupt
        interrupt.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
