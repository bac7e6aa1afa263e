"""For every pytest run: one thread unless told otherwise, Ctrl-C as usual, nbval's sanitize file found anywhere."""

from __future__ import annotations

import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Two workers with two threads each would wait for each other. Kernels inherit the environment.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # What a shell starts in the background ignores Ctrl-C and hands that down: tests that press it would press nothing.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sanitize = config.getoption("nbval_sanitize_with", default=None)
    if sanitize:
        config.option.nbval_sanitize_with = str(config.rootpath / sanitize)
