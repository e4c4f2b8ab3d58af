"""Ends requests that are under way in other threads, when nobody waits for their answers any more."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

__all__ = ["Stop", "check_stop", "current_stop", "pause"]

_POLL = 0.1
_of_thread = threading.local()


def current_stop() -> Stop | None:
    """The stop that was put on this thread."""
    found: Stop | None = getattr(_of_thread, "stop", None)
    return found


class Stop:
    """Tells threads to give up; one made in such a thread follows that thread's own stop, too.

    ::

        stop = Stop()
        pool = ThreadPoolExecutor(4, initializer=stop.put_on_thread)
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._parent = current_stop()

    def put_on_thread(self) -> None:
        """Make it the stop of the thread that calls this."""
        _of_thread.stop = self

    def set(self) -> None:
        """Tell the threads to give up."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether to give up."""
        return self._event.is_set() or (self._parent is not None and self._parent.is_set())


def check_stop() -> None:
    """Raise a CancelledError if this thread was told to give up."""
    if (stop := current_stop()) and stop.is_set():
        raise CancelledError


def pause(seconds: float) -> None:
    """Sleep, but no longer than until this thread is told to give up."""
    stop, end = current_stop(), time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not (stop and stop.is_set()):
        time.sleep(min(left, _POLL) if stop else left)
