"""Split the missing part of a batch into pieces that are extracted and stored separately.

A killed run loses only the pieces in progress, so the piece size follows the measured speed: a power of two,
from one forward pass up to a shard, aligned to its own size. Forward passes are the same as in a whole shard,
so features do not depend on the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import compress, pairwise
from time import monotonic
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evalkit.features import store

__all__ = ["Cutter", "Piece"]

SHORT, LONG = 5.0, 10.0
"""Seconds: after a piece that took less than SHORT, pieces get larger; after more than LONG, smaller."""


class Piece(NamedTuple):
    """Consecutive images whose features are extracted together.

    Attributes:
        begin: Index of the first image.
        end: Index after the last image.
        networks: Networks whose features are missing.
    """

    begin: int
    end: int
    networks: tuple[str, ...]


class Cutter:
    """Splits the missing images of a batch into pieces, and adapts their size to the time they take.

    Args:
        unit: Images in the smallest piece, a power of two: the largest batch size of the networks.
        missing: By network, (n,) booleans: whether the features of an image are missing.
    """

    def __init__(self, unit: int, missing: Mapping[str, NDArray[np.bool_]]) -> None:
        self._unit = unit
        self._count = 1  # units in a piece
        self._begun: dict[int, tuple[Piece, float]] = {}
        self._networks = tuple(missing)
        columns = np.stack([*missing.values()])
        self._n = columns.shape[1]
        # (networks, units): whether any image of the unit is missing.
        self._due = np.logical_or.reduceat(columns, np.arange(0, self._n, unit), axis=1)

    @property
    def images(self) -> int:
        """Number of images in all pieces together."""
        return sum(
            min(last * self._unit, self._n) - first * self._unit for first, last, _ in self._stretches()
        )

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces in order. A size is chosen, and the clock starts, when a piece is requested."""
        number = 0
        for first, last, networks in self._stretches():
            while first < last:
                count = self._fitting(first, last)
                piece = Piece(first * self._unit, min((first + count) * self._unit, self._n), networks)
                self._begun[number] = piece, monotonic()
                yield piece
                number, first = number + 1, first + count

    def end(self, number: int) -> Piece:
        """Record that a piece is done, and return it."""
        piece, begun = self._begun.pop(number)
        seconds, count = monotonic() - begun, -(-(piece.end - piece.begin) // self._unit)
        # Of several pieces in progress, only the first to finish changes the size.
        if seconds < SHORT and count == self._count:
            self._count = min(2 * count, store.SHARD // self._unit)
        elif seconds > LONG and count <= self._count:
            self._count = max(1, (1 << count.bit_length()) // 4)
        return piece

    def _fitting(self, first: int, last: int) -> int:
        """Units of the next piece: aligned to its own size, and without images that are already stored."""
        count = self._count
        while first % count or (first + count > last and last < self._due.shape[1]):
            count //= 2
        return count

    def _stretches(self) -> Iterator[tuple[int, int, tuple[str, ...]]]:
        """Runs of units that are missing for the same networks: first unit, unit after the last, networks."""
        changes = np.flatnonzero((self._due[:, 1:] != self._due[:, :-1]).any(axis=0)) + 1
        edges = [0, *changes.tolist(), self._due.shape[1]]
        for first, last in pairwise(edges):
            if networks := tuple(compress(self._networks, self._due[:, first])):
                yield first, last, networks
