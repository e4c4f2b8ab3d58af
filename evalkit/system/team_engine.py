"""Who does the pieces of a long job: this process alone, or several that share it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

from evalkit.system.progress import Progress

__all__ = ["Arrays", "Engine", "Inline"]

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""The result of a piece of work."""


class Engine(Protocol):
    """Does pieces of work whose results do not depend on who does which.

    Attributes:
        rank: Of this process. Rank 0 has all results and prints.
        size: Number of processes.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102 - described above
    @property
    def size(self) -> int: ...  # noqa: D102

    def map(self, name: str, count: int, work: Callable[[int], Arrays]) -> Iterator[Arrays]:
        """The results of ``work(0)`` to ``work(count - 1)``, in this order.

        Args:
            name: Different for different work; the same in every process.
            count: Number of pieces.
            work: Does one piece.
        """

    def claims(
        self, locks: Path, missing: Callable[[], Collection[int]]
    ) -> Generator[int | None, None, None]:
        """Yield pieces for this process to do, one at a time, until none is missing.

        Yields None while other processes hold all missing pieces: stop then, or ask again to wait.

        Args:
            locks: A file for the locks of this work.
            missing: Gives the numbers of the pieces that are not done, ascending.
        """

    def watched(self, progress: Progress | None) -> Progress | None:
        """``progress`` for this process: rank 0 alone shows it."""


class Inline:
    """This process, without any other."""

    rank = 0
    size = 1

    def map(self, name: str, count: int, work: Callable[[int], Arrays]) -> Iterator[Arrays]:
        """Each piece when its result is needed."""
        del name
        return map(work, range(count))

    def claims(
        self, locks: Path, missing: Callable[[], Collection[int]]
    ) -> Generator[int | None, None, None]:
        """What is missing now, in order."""
        del locks
        yield from missing()

    def watched(self, progress: Progress | None) -> Progress | None:
        """``progress`` itself."""
        return progress
