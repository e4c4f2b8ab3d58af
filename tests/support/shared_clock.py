"""A clock that the processes of a job share, and that stands still while one of them works.

Once all wait, it goes on to the moment that the first of them waits for. So things take as long as a test
says, on every machine; and to wait for half an hour takes no time.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
import time
from collections.abc import Collection
from pathlib import Path

RANKS = 4
WORKS, TAKES_NO_PART = -math.inf, math.inf


class SharedClock:
    """The clock as one process sees it: stands in for the module ``time``.

    Its file holds the time, and for each rank the moment it waits for.
    """

    def __init__(self, path: Path, rank: int):
        self._file = os.open(path, os.O_RDWR)
        self._rank = rank

    @classmethod
    def create(cls, path: Path, ranks: Collection[int]) -> None:
        """A new clock, which waits for these to begin."""
        path.unlink(missing_ok=True)
        waits = [WORKS if rank in ranks else TAKES_NO_PART for rank in range(RANKS)]
        path.write_bytes(struct.pack(f"{1 + RANKS}d", 0.0, *waits))

    def monotonic(self) -> float:
        return self._read()[0]

    def time(self) -> float:
        """Of the world, not of this clock: files tell their age by it."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        until = self._wait_for(self.monotonic() + seconds)
        while self.monotonic() < until:
            time.sleep(0.001)
            self._wait_for(until)
        self._wait_for(WORKS)

    def leave(self) -> None:
        """This process takes no part from now on: it has ended, or hangs."""
        self._wait_for(TAKES_NO_PART)

    def close(self) -> None:
        os.close(self._file)

    def _wait_for(self, moment: float) -> float:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        now, *waits = self._read()
        waits[self._rank] = moment
        first = min(waits)
        os.pwrite(
            self._file, struct.pack(f"{1 + RANKS}d", now if first == math.inf else max(now, first), *waits), 0
        )
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return moment

    def _read(self) -> tuple[float, ...]:
        return struct.unpack(f"{1 + RANKS}d", os.pread(self._file, 8 * (1 + RANKS), 0))
