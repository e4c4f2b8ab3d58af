"""Read a file at a URL in ranges: large ones, prefetched, for sequential reads, and small ones otherwise.

A cache shared by all files holds the most recent ranges, so opening a file, which reads the same parts
several times, sends each request only once.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any, TypeVar

from evalkit.system.stops import Stop

if TYPE_CHECKING:
    from evalkit.system.storage import Remote

__all__ = ["fetch_each", "open_ranges"]

T = TypeVar("T")
R = TypeVar("R")

SMALL = 2**20
"""Bytes per range for random access, as to the directory of a zip."""
LARGE = 2**23
"""Bytes per range for sequential reads."""
_AHEAD = 3
"""Large ranges requested ahead while one is in use, to hide latency."""
_KEPT = 2**27
"""Bytes in the cache shared by all files."""
_BUFFER = 2**17
_MOST_BYTES = 2**28
"""Maximum bytes in flight or queued in :func:`fetch_each`, unless a single item is larger."""


class _Kept:
    """The most recently used ranges, up to :data:`_KEPT` bytes."""

    def __init__(self) -> None:
        self._ranges: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, int]) -> bytes | None:
        with self._lock:
            if key in self._ranges:
                self._ranges.move_to_end(key)
            return self._ranges.get(key)

    def put(self, key: tuple[str, int, int], data: bytes) -> None:
        with self._lock:
            if key not in self._ranges:
                self._ranges[key] = data
                self._bytes += len(data)
            while self._bytes > _KEPT:
                self._bytes -= len(self._ranges.popitem(last=False)[1])


_kept = _Kept()


def open_ranges(remote: Remote) -> IO[bytes]:
    """Open a seekable file; closing it ends its threads."""
    return io.BufferedReader(_Ranges(remote), _BUFFER)


class _Ranges(io.RawIOBase):
    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._size = remote.size
        self._version = remote.version
        self._position = 0
        self._last_small = -1
        self._ahead: dict[int, Future[bytes]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._stop = Stop()
        self._lock = threading.Lock()
        self.name = str(remote)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("seek to before the beginning of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        with self._lock:
            count = min(len(view), self._size - self._position)
            if count <= 0:
                return 0
            start, data = self._range_at(self._position)
            piece = memoryview(data)[self._position - start :][:count]
            view[: len(piece)] = piece
            self._position += len(piece)
            return len(piece)

    def _range_at(self, position: int) -> tuple[int, bytes]:
        """Start and bytes of a range that contains this position."""
        large, small = position // LARGE, position // SMALL
        in_order, self._last_small = self._last_small == small - 1, small
        if large in self._ahead or self._get(LARGE, large) is not None:
            return large * LARGE, self._large(large)
        data = self._get(SMALL, small)
        if data is None and in_order:
            return large * LARGE, self._large(large)
        return small * SMALL, self._fetch(SMALL, small) if data is None else data

    def _large(self, index: int) -> bytes:
        """A large range; requests the following ones in the background."""
        for old in [other for other in self._ahead if not index <= other <= index + _AHEAD]:
            self._ahead.pop(old).cancel()
        if index not in self._ahead:
            data = self._get(LARGE, index)
            if data is not None:
                return data  # a cache hit does not show that reads are sequential
            self._start(index)
        for following in range(index + 1, min(index + _AHEAD, (self._size - 1) // LARGE) + 1):
            if following not in self._ahead and self._get(LARGE, following) is None:
                self._start(following)
        return self._ahead[index].result()

    def _start(self, index: int) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_AHEAD + 1, "ranges", self._stop.put_on_thread)
        self._ahead[index] = self._pool.submit(self._fetch, LARGE, index)

    def _get(self, unit: int, index: int) -> bytes | None:
        return _kept.get((self._version, unit, index))

    def _fetch(self, unit: int, index: int) -> bytes:
        data = self._remote.fetch(index * unit, min((index + 1) * unit, self._size))
        _kept.put((self._version, unit, index), data)
        return data

    def close(self) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._ahead = {}
        super().close()


def fetch_each(
    function: Callable[[T], R],
    items: Iterable[T],
    threads: int = 16,
    *,
    size: Callable[[T], int] = lambda _: 0,
) -> Generator[R, None, None]:
    """Yield ``function(item)`` in order, while threads request the next ones.

    Args:
        function: Sends a request to a server.
        items: Arguments of the function.
        threads: Number of concurrent requests.
        size: Bytes of a result; may send a request. Large results are fetched fewer at a time.
    """
    stop, end = Stop(), object()
    rest = iter(items)
    asked: deque[tuple[T, Future[int]]] = deque()  # size requested
    waiting: deque[tuple[int, Future[R]]] = deque()
    with ThreadPoolExecutor(threads, "fetch", stop.put_on_thread) as pool:
        try:
            while True:
                while len(asked) <= threads and (item := next(rest, end)) is not end:
                    asked.append((item, pool.submit(size, item)))  # type: ignore[arg-type]
                while asked and len(waiting) <= threads and (asked[0][1].done() or not waiting):
                    count = asked[0][1].result()
                    if waiting and count + sum(each for each, _ in waiting) > _MOST_BYTES:
                        break
                    waiting.append((count, pool.submit(function, asked.popleft()[0])))
                if not waiting:
                    return
                yield waiting.popleft()[1].result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
