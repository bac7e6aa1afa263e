"""Run notebooks side by side, each in a process of its own.

Whatever happens to one (a cell that fails, a kernel that dies, no memory left), the others are run; on Ctrl-C what is
running is stopped and written as far as it came.
"""

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from dfqlib.rerun.execution import Job, Run, code_cells, execute, fix_environment, write_results
from dfqlib.rerun.parameters import import_extra, read_notebook

__all__ = ["run_jobs", "start_context"]

KILLED = "its process was killed; is there enough memory?"


def run_jobs(jobs: Sequence[Job], processes: int = 1, *, progress: bool | None = False) -> Iterator[Run]:
    """Run the jobs, some at a time, and yield each as it ends.

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
        runner, pool = _Runner(bar), ThreadPoolExecutor(processes)
        futures = [pool.submit(runner.run, job) for job in jobs]
        try:
            for done in as_completed(futures):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            pool.shutdown()


def start_context() -> Any:
    """How to start the processes: forked from one that has imported everything once, or else anew each time."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dfqlib.__main__", "papermill", "nbconvert"])
    return context


class _Runner:
    """Runs jobs from several threads; ``stop`` ends those that are running."""

    def __init__(self, bar: Any) -> None:
        self.context, self.bar = start_context(), bar
        self.lock, self.running, self.stopped = threading.Lock(), list[BaseProcess](), False

    def run(self, job: Job) -> Run:
        start = time.perf_counter()
        process, pipe = self._start(job)
        self.bar.set_postfix_str(job.name)
        try:
            while (message := pipe.recv()) is None:
                self.bar.update()
            record: dict[str, Any] = message
        except EOFError:
            process.join()
            record = write_results(job, time.perf_counter() - start, None, KILLED)
        finally:
            process.join()
            with self.lock:
                self.running.remove(process)
            pipe.close()
        return Run(job, record)

    def _start(self, job: Job) -> tuple[BaseProcess, Connection]:
        ours, its = self.context.Pipe(duplex=False)
        process: BaseProcess = self.context.Process(target=_work, args=(job, its), name=job.name)
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


def _work(job: Job, pipe: Connection) -> None:
    """What a job's process does: send None for each cell, then the record."""
    # Ctrl-C reaches every process of the terminal; the first one decides, and terminates this one once.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, _interrupt)
    fix_environment()
    start = time.perf_counter()
    try:
        error = execute(job, lambda: pipe.send(None))
    except KeyboardInterrupt:
        error = "interrupted"
    pipe.send(write_results(job, time.perf_counter() - start, _peak_gb(), error))


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _peak_gb() -> float | None:
    """The most memory that a kernel of this process has held; not below what this process held itself."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(peak / (1e9 if sys.platform == "darwin" else 1e6), 3)
