"""Run notebooks side by side, each in a process of its own.

Whatever happens to one (a cell that fails, a kernel that dies, no memory left), the others are run; on Ctrl-C what is
running is stopped.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from dfqlib.lessons.reruns.execution import Job, Run, code_cells, execute, fix_environment, write_results
from dfqlib.lessons.reruns.parameters import import_extra, read_notebook

__all__ = ["run_apart", "run_jobs"]

KILLED = "its process was killed; is there enough memory?"
Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task, Callable[[], None]], Result]


def run_jobs(jobs: Sequence[Job], processes: int = 1, *, progress: bool | None = False) -> Iterator[Run]:
    """Run the jobs, some at a time, and yield each as it ends; after Ctrl-C each is written as far as it came.

    Args:
        jobs: whose outputs ``check_output`` has found usable.
        processes: how many at a time; each takes one thread.
        progress: a bar that counts cells; None shows it on a terminal only.

    Raises:
        InputError: the ``notebooks`` extra is not installed.
    """
    from tqdm.auto import tqdm

    for package in ("papermill", "nbconvert"):
        import_extra(package)
    cells = sum(len(code_cells(read_notebook(job.source))) for job in jobs)
    with tqdm(total=cells, unit="cell", disable=None if progress is None else not progress, leave=False) as bar:

        def killed(job: Job, seconds: float) -> dict[str, Any]:
            return write_results(job, seconds, None, KILLED)

        for job, record in run_apart(_work, jobs, processes, killed, bar.update):
            yield Run(job, record)


def run_apart(
    work: Work[Task, Result],
    tasks: Sequence[Task],
    processes: int,
    killed: Callable[[Task, float], Result],
    tick: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Task, Result]]:
    """Do ``work`` on each task in a fresh process, some at a time, and yield each task with its result as it ends.

    Args:
        work: a function of a module, called with the task and a function to be called after each step.
        tasks: what can be pickled.
        processes: how many at a time.
        killed: gives the result of a task whose process ended without one after so many seconds.
        tick: called in this process after each step.
    """
    runner, pool = _Runner(work, killed, tick), ThreadPoolExecutor(processes)
    futures = [pool.submit(runner.run, task) for task in tasks]
    try:
        for done in as_completed(futures):
            yield done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        runner.stop()
        pool.shutdown()


class _Runner(Generic[Task, Result]):
    """Runs tasks from several threads; ``stop`` ends those that are running."""

    def __init__(
        self, work: Work[Task, Result], killed: Callable[[Task, float], Result], tick: Callable[[], object]
    ) -> None:
        # A server that has imported everything once forks a child in no time; spawning imports it all again.
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self.context.set_forkserver_preload(["dfqlib.__main__", "papermill", "nbconvert"])
        self.work, self.killed, self.tick = work, killed, tick
        self.lock, self.running, self.stopped = threading.Lock(), list[BaseProcess](), False

    def run(self, task: Task) -> tuple[Task, Result]:
        start = time.perf_counter()
        process, pipe = self._start(task)
        try:
            while (message := pipe.recv()) is None:
                self.tick()
        except EOFError:
            message = None
        finally:
            process.join()
            with self.lock:
                self.running.remove(process)
            pipe.close()
        if message is None:
            return task, self.killed(task, time.perf_counter() - start)
        result, error = message
        if error is not None:
            raise error
        return task, result

    def _start(self, task: Task) -> tuple[BaseProcess, Connection]:
        ours, its = self.context.Pipe(duplex=False)
        process: BaseProcess = self.context.Process(target=_serve, args=(self.work, task, its))
        with self.lock:
            process.start()
            self.running.append(process)
            if self.stopped:
                process.terminate()
        its.close()  # so that reading ends when the process does
        return process, ours

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


def _serve(work: Work[Task, Result], task: Task, pipe: Connection) -> None:
    """What a task's process does: send None after each step, then the result or the error."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is for the first process, which terminates this one
    signal.signal(signal.SIGTERM, _interrupt)
    fix_environment()
    try:
        pipe.send((work(task, lambda: pipe.send(None)), None))
    except Exception as error:
        pipe.send((None, error))
    except KeyboardInterrupt:
        pass


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _work(job: Job, tick: Callable[[], None]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        error = execute(job, tick)
    except KeyboardInterrupt:
        error = "interrupted"
    return write_results(job, time.perf_counter() - start, _peak_gb(), error)


def _peak_gb() -> float | None:
    """The most memory that a kernel of this process has held; not below what this process held itself."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(peak / (1e9 if sys.platform == "darwin" else 1e6), 3)
