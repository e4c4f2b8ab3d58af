"""Run tasks in background threads while the caller does something else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, Self, TypeVar

from evalkit.system.processes import cores
from evalkit.system.progress import Progress
from evalkit.system.stops import Stop

__all__ = ["Background", "Task", "read_ahead"]

T = TypeVar("T")

_POLL = 0.1
"""Seconds between two checks of a task's progress."""


class Background:
    """Background threads that start tasks in the order they were submitted.

    There is one thread for every two cores, because a task also has a thread that reads ahead; at most two.

    Leaving the block ends the threads: queued tasks are cancelled, and running tasks are told to stop (see
    :func:`evalkit.system.stops.check_stop`).
    """

    def __init__(self) -> None:
        self._stop = Stop()
        count = min(2, cores() // 2)
        self._pool = ThreadPoolExecutor(count, "background", self._stop.put_on_thread) if count else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def begin(self, function: Callable[[Progress], T]) -> Task[T] | None:
        """Start ``function(progress)``; None on a single core, where it would only slow down the caller."""
        return None if self._pool is None else Task(function, self._pool)


class Task(Generic[T]):
    """A function running in a background thread; created by :meth:`Background.begin`."""

    def __init__(self, function: Callable[[Progress], T], pool: ThreadPoolExecutor) -> None:
        self._function = function
        self._reached: tuple[str, int, int] | None = None
        self._future = pool.submit(function, self._note)

    def _note(self, stage: str, done: int, total: int) -> None:
        self._reached = stage, done, total

    def result(self, progress: Progress | None = None) -> T:
        """Return the function's result, or raise its error. A cancelled task is run here instead.

        Args:
            progress: Called in this thread while it waits, so that stages of two threads do not mix.
        """
        shown = None
        while not self._future.done():
            if progress is not None and (reached := self._reached) not in (None, shown):
                progress(*reached)
                shown = reached
            wait([self._future], _POLL)
        if progress is not None and shown is not None and (reached := self._reached) not in (None, shown):
            progress(*reached)
        try:
            return self._future.result()
        except CancelledError:
            return self._function(progress or (lambda *_: None))


def read_ahead(iterator: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield the same items while a background thread produces the next ones.

    An exception of the iterator is raised in place of its item. When the generator is closed or garbage
    collected, or the consumer is interrupted, the item in progress is finished (a request to a server is
    cancelled), the iterator is closed and the thread ends.

    Args:
        iterator: Produces the items.
        depth: Maximum number of items produced ahead, besides the one that the consumer has.
    """
    items, end = iter(iterator), object()
    stop = Stop()
    with ThreadPoolExecutor(1, "read-ahead", stop.put_on_thread) as thread:
        try:
            waiting = deque(thread.submit(next, items, end) for _ in range(depth))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            stop.set()
            thread.shutdown(cancel_futures=True)
            if isinstance(items, Generator):
                items.close()
