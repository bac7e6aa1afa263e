"""For every pytest run, notebooks included: one thread, Ctrl-C as usual, nbval's sanitize file found from anywhere."""

from __future__ import annotations

import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Sums differ in the last digit between thread counts, and the notebooks' outputs were made with one.
    # Kernels inherit the environment.
    os.environ["OMP_NUM_THREADS"] = "1"
    # What a shell starts in the background ignores Ctrl-C and hands that down: tests that press it would press nothing.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sanitize = config.getoption("nbval_sanitize_with", default=None)
    if sanitize:
        config.option.nbval_sanitize_with = str(config.rootpath / sanitize)
