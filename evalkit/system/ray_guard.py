"""Cleans up after a private Ray, also where the process that started it was killed.

That process starts this file as a program and holds the other end of its standard input. Ray itself leaves
agents for a minute, stopped processes for ever, and its folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

__all__ = ["MARK", "main"]

MARK = "EVALKIT_PRIVATE_RAY"
"""In the environment of all processes of a private Ray: its folder."""

LONGEST_SECONDS = 30.0


def main(folder: str) -> None:
    """Wait for a byte or the end of standard input, end all with the mark of a folder, and remove it."""
    # The end alone does not do: processes that the starter has forked hold the other end, too.
    sys.stdin.buffer.read(1)
    until = time.monotonic() + LONGEST_SECONDS
    while (found := _marked(folder)) and time.monotonic() < until:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(folder: str) -> list[int]:
    """None where the system has no ``/proc``."""
    mark, found = f"{MARK}={folder}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
