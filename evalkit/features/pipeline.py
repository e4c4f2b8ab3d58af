"""Shards on their way from the networks to the store: computed ahead on a device, written by a thread."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from evalkit.extractors.base import Extracted, Extractor, Pending, Rows, RunsAhead

__all__ = ["BegunShard", "Pipeline", "Shard"]

Shard: TypeAlias = dict[str, dict[str, Rows]]
"""The rows of one shard by network and output."""

_WRITES = 2
"""Shards that may wait to be written, 8 MB each with Inception."""


class BegunShard:
    """A shard whose images the networks have been given, and whose features may not be there yet.

    Args:
        number: Of the shard.
        count: Images in it.
        extractors: The networks.
    """

    def __init__(self, number: int, count: int, extractors: Iterable[Extractor]) -> None:
        self.number = number
        self.extractors = tuple(extractors)
        self._rows: Shard = {
            extractor.network: {
                output: np.empty((count, d), np.float32) for output, d in extractor.outputs.items()
            }
            for extractor in self.extractors
        }
        self._parts: deque[tuple[str, slice, Pending]] = deque()

    def add(self, extractor: Extractor, images: NDArray[Any], at: int) -> None:
        """Give a network some of the images, the first of which is the shard's number ``at``."""
        pending = extractor.submit(images) if _runs_ahead(extractor) else Extracted(extractor(images))
        self._parts.append((extractor.network, slice(at, at + len(images)), pending))
        while self._parts and self._parts[0][2].done():
            self._take()

    def done(self) -> bool:
        """Whether :meth:`result` would not wait."""
        return all(pending.done() for _, _, pending in self._parts)

    def result(self) -> Shard:
        """All rows, once they are there."""
        while self._parts:
            self._take()
        return self._rows

    def _take(self) -> None:
        network, rows, pending = self._parts.popleft()
        for output, found in pending.result().items():
            self._rows[network][output][rows] = found


def _runs_ahead(extractor: Extractor) -> TypeGuard[RunsAhead]:
    """Whether ``submit`` does what a call does: not where a subclass changed the call alone."""

    def owner(name: str) -> type | None:
        return next((kind for kind in type(extractor).__mro__ if name in vars(kind)), None)

    submits, calls = owner("submit"), owner("__call__")
    return submits is not None and calls is not None and issubclass(submits, calls)


class Pipeline:
    """Has shards written in their order. What a device runs ahead with is written while it goes on.

    Leaving the block waits until everything is written, also after an error or an interruption.

    Args:
        write: Writes a shard. It is called in one thread at a time.
    """

    def __init__(self, write: Callable[[BegunShard, Shard], object]) -> None:
        self._write = write
        self._computing: deque[BegunShard] = deque()
        self._writing: deque[tuple[int, Future[object]]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # After an error, that error is the one to raise.
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
                self.drain()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    @property
    def numbers(self) -> Iterator[int]:
        """Of the shards that are not written yet."""
        yield from (shard.number for shard in self._computing)
        yield from (number for number, _ in self._writing)

    def add(self, shard: BegunShard) -> None:
        """Take a shard. The one before it is waited for, so that a device has two."""
        if shard.done():  # nothing runs ahead
            self.drain()
            self._write(shard, shard.result())
            return
        self._computing.append(shard)
        if len(self._computing) > 1:
            self._begin_to_write()

    def drain(self) -> None:
        """Wait until everything is written."""
        while self._computing:
            self._begin_to_write()
        while self._writing:
            self._end_write()

    def _begin_to_write(self) -> None:
        shard = self._computing.popleft()
        rows = shard.result()
        while len(self._writing) >= _WRITES:
            self._end_write()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-features")
        self._writing.append((shard.number, self._thread.submit(self._write, shard, rows)))

    def _end_write(self) -> None:
        self._writing.popleft()[1].result()
