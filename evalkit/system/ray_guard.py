"""Clean up after a private Ray instance, even if the process that started it was killed.

That process runs this file as a program, and holds the other end of its standard input. Ray itself leaves
agents running for a minute, stopped processes forever, and its folder.
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
"""Environment variable that names the folder, in all processes of a private Ray instance."""

LONGEST_SECONDS = 30.0


def main(folder: str) -> None:
    """Wait for a byte or the end of standard input, kill all processes marked with a folder, remove it."""
    # End of input alone is not enough: forks of the parent process also hold the other end.
    sys.stdin.buffer.read(1)
    until = time.monotonic() + LONGEST_SECONDS
    while (found := _marked(folder)) and time.monotonic() < until:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(folder: str) -> list[int]:
    """IDs of processes marked with a folder; empty if the system has no ``/proc``."""
    mark, found = f"{MARK}={folder}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if mark in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
