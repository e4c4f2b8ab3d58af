"""Cleans up after a private Ray, also where the process that started it was killed.

That process starts this file as a program and holds the other end of its standard input. Ray itself leaves
agents for a minute, stopped processes for ever, and its folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

__all__ = ["main"]


def main(folder: Path) -> None:
    """Wait for the end of standard input, end all others that have files of a folder open, and remove it."""
    starter = os.getppid()
    sys.stdin.buffer.read()
    while found := _users(folder) - {starter}:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _users(folder: Path) -> set[int]:
    """Of the processes of this user; none where the system has no ``/proc``."""
    found = set()
    for files in Path("/proc").glob("[0-9]*/fd"):
        try:
            targets = [file.readlink() for file in files.iterdir()]
        except OSError:  # it has ended, or is another user's
            continue
        if any(target.is_relative_to(folder) for target in targets):
            found.add(int(files.parent.name))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
