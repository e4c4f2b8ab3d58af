"""Cancel work in other threads, such as requests, once its results are no longer needed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

__all__ = ["Stop", "check_stop", "current_stop", "pause"]

_POLL = 0.1
_of_thread = threading.local()


def current_stop() -> Stop | None:
    """The stop of the current thread."""
    found: Stop | None = getattr(_of_thread, "stop", None)
    return found


class Stop:
    """Tells threads to stop. A Stop created in such a thread also follows that thread's own stop.

    ::

        stop = Stop()
        pool = ThreadPoolExecutor(4, initializer=stop.put_on_thread)
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._parent = current_stop()

    def put_on_thread(self) -> None:
        """Make this the stop of the calling thread."""
        _of_thread.stop = self

    def set(self) -> None:
        """Tell the threads to stop."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._event.is_set() or (self._parent is not None and self._parent.is_set())


def check_stop() -> None:
    """Raise a CancelledError if this thread was told to stop."""
    if (stop := current_stop()) and stop.is_set():
        raise CancelledError


def pause(seconds: float) -> None:
    """Sleep, but wake up early if this thread is told to stop."""
    stop, end = current_stop(), time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not (stop and stop.is_set()):
        time.sleep(min(left, _POLL) if stop else left)
