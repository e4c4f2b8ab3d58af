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

__all__ = ["main"]

MOST_SECONDS = 30.0
"""Then it gives up: a process that waits for a disk or a server cannot be ended."""

OF_STARTERS = "python-core-driver-"
"""Begins the name of a file of the starter. Processes that it forked have it open, too, and live on."""


def main(folder: Path) -> None:
    """Wait for a byte or the end of standard input, end all of Ray that uses a folder, and remove that."""
    starter = os.getppid()
    # The end alone does not do: processes that the starter has forked hold the other end, too.
    sys.stdin.buffer.read(1)
    hangs = time.monotonic() + MOST_SECONDS
    while (found := _users(folder) - {starter}) and time.monotonic() < hangs:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _users(folder: Path) -> set[int]:
    """Ray's processes that have files of a folder open; none where the system has no ``/proc``."""
    found = set()
    for files in Path("/proc").glob("[0-9]*/fd"):
        try:
            targets = [file.readlink() for file in files.iterdir()]
        except OSError:  # it has ended, or is another user's
            continue
        names = [target.name for target in targets if target.is_relative_to(folder)]
        if names and not any(name.startswith(OF_STARTERS) for name in names):
            found.add(int(files.parent.name))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
