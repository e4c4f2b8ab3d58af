"""Processes that die at a chosen moment of their work, the same one on every machine.

A moment is a number of function calls, of Python and of C: as fine as a time, and it does not depend on how
fast the machine is or what else it does. Who uses this forks, and so must have no threads.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

Work = Callable[[], object]


def start(work: Work) -> int:
    """A process that does the work; returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def calls_of(work: Work) -> int:
    """How many calls the work takes, which another process does."""
    reading, writing = os.pipe()

    def counted() -> None:
        calls = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        work()
        sys.setprofile(None)
        os.write(writing, str(calls).encode())

    code = wait(start(counted))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    assert code == 0
    return int(text)


def dying_after(calls: int, work: Work) -> Work:
    """The work, which kills its own process at that many calls, if it takes so many."""

    def dying() -> object:
        left = calls

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal left
            left -= event in ("call", "c_call")
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        return work()

    return dying


def dying_at_rename(number: int, work: Work, *, after: bool = False) -> Work:
    """The work, which kills its own process before or after that renaming of a file."""

    def dying() -> object:
        original, count = os.replace, 0

        def replace(*arguments: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            if count == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*arguments, **options)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace  # type: ignore[assignment]
        return work()

    return dying


def again_and_again(work: Work, calls: int, seed: int = 0) -> tuple[int, int]:
    """Kill the work at random moments until it lives to its end.

    At first these are less than a third of its ``calls`` on. Later and later ones become possible, so that it
    comes to its end even if it never went on.

    Returns:
        The number of kills, and the exit code in the end.
    """
    chance, kills = random.Random(seed), 0
    while True:
        moment = int(calls * chance.uniform(0.0, 0.3 + kills / 20))
        code = wait(start(dying_after(moment, work)))
        if code != -signal.SIGKILL:
            return kills, code
        kills += 1
