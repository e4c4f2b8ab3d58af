"""Waiting for what a test needs to have happened, however slow the machine is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

SECONDS = 300
"""Only ends a hang: no test may depend on it."""


def until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for ``condition``, which ``process`` is to bring about: its end before that is a failure."""
    hangs = time.monotonic() + SECONDS
    while not condition():
        assert process is None or process.poll() is None or condition(), "the process has ended"
        assert time.monotonic() < hangs, f"it has not happened in {SECONDS} seconds"
        time.sleep(0.01)
