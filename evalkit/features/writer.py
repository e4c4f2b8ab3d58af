"""Write pieces of features in a background thread while the next ones are computed."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeAlias

from evalkit.extractors.base import Rows
from evalkit.features.pieces import Piece

__all__ = ["RowsOf", "Writer"]

RowsOf: TypeAlias = dict[str, dict[str, Rows]]
"""Rows by network and output."""

_WAITING = 2
"""Maximum number of pieces in the queue, at most 8 MB each with Inception."""


class Writer:
    """Writes pieces in order, in a background thread.

    Leaving the block waits until everything is written, even after an error or an interruption.

    Args:
        write: Writes a piece. All calls are in the same thread.
    """

    def __init__(self, write: Callable[[Piece, RowsOf], object]) -> None:
        self._write = write
        self._waiting: deque[Future[object]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-features")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # If the block raised an error, keep that one.
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
                while self._waiting:
                    self._waiting.popleft().result()
        finally:
            self._thread.shutdown()

    def add(self, piece: Piece, rows: RowsOf) -> None:
        """Queue a piece. Raises the error of an earlier piece, if there was one."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= _WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._write, piece, rows))
