"""Finds the nearest neighbours of all points, and the points inside balls of the other side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from evalkit.metrics.points import Points, decide
from evalkit.metrics.screening import Screening

__all__ = [
    "Covering",
    "Inside",
    "Nearest",
    "Neighbours",
    "counted",
    "each_stripe",
    "radii",
    "slices",
    "smallest",
]

T = TypeVar("T")

# The share of pairs that is worth deciding one by one; if a screen leaves more, the next finer one is used.
_SURVIVORS = 0.01

# Entries of a row that are first examined together, by their minimum.
_GROUP = 16


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size`` entries; the last may be shorter."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def counted(total: int, progress: Callable[[int, int], object] | None) -> Callable[[int], None]:
    """A function that is called with numbers of rows, and reports how many of ``total`` are done."""
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    return advance


def each_stripe(
    points: Points, screening: Screening, look: Callable[[slice], T], advance: Callable[[int], object]
) -> Iterator[T]:
    """What ``look`` finds in each stripe of rows of the matrix of distances from these points."""
    for rows in slices(0, len(points.x), screening.tile[0]):
        screening.begin()
        yield look(rows)
        advance(rows.stop - rows.start)


def radii(points: Points, k: int, screening: Screening, advance: Callable[[int], object]) -> Tensor:
    """(n,) squared distance of each point to its k-th nearest neighbour in its set."""
    neighbours = Neighbours(points, k, screening)
    nearest = neighbours.none()
    for found in each_stripe(points, screening, neighbours.look, advance):
        nearest = smallest(nearest, found)
    return nearest[:, k]


class Neighbours:
    """Finds the distances of all points of a side to their k nearest neighbours, and to themselves.

    One product for each pair of stripes of points serves the neighbours of both.
    """

    def __init__(self, points: Points, k: int, screening: Screening) -> None:
        self._points = points
        self._k = k
        self._screening = screening
        self._nearest = self.none()
        # (n,) upper bounds of the radii, from the pairs that were examined.
        self._bound = self._nearest[:, k].clone()

    def none(self) -> Tensor:
        """(n, k + 1) distances before anything is found."""
        shape = len(self._points.x), self._k + 1
        return torch.full(shape, torch.inf, dtype=torch.float64, device=self._points.x.device)

    def look(self, rows: slice) -> Tensor:
        """Examine the pairs of these points with each other and with later ones.

        Returns:
            (n, k + 1) the smallest decided distances of each point, ascending. Infinity stands for distances
            that are larger than the (k + 1)-th smallest of all.
        """
        found = self.none()
        for columns in (rows, *slices(rows.stop, len(self._points.x), self._screening.tile[1])):
            pairs = None
            while pairs is None:
                pairs = self._pairs(rows, columns)
            for own, i, other, j in pairs:
                distances = decide(self._points, i + own.start, self._points, j + other.start)
                _insert(found[own], i, distances)
            self._bound[rows] = torch.minimum(self._bound[rows], found[rows, self._k])
        found[self._bound == 0] = 0
        self._nearest = smallest(self._nearest, found)
        self._bound = torch.minimum(self._bound, self._nearest[:, self._k])
        return found

    def _pairs(self, rows: slice, columns: slice) -> list[tuple[slice, Tensor, slice, Tensor]] | None:
        """Pairs that may be neighbours, as indices into two ranges; None after refining the screen."""
        screening, points = self._screening, self._points
        seen = screening.seen(points, rows, points, columns)
        sides = [(rows, columns, seen)]
        if rows != columns:
            sides.append((columns, rows, seen.T))
        pairs = []
        for own, other, matrix in sides:
            self._bound_by_the_nearest(own, other, matrix)
            bound = self._bound[own]
            # A radius of 0 cannot shrink, so duplicates need not be compared with each other.
            limits = torch.where(bound > 0, bound, -1)
            found = _candidates(screening, matrix, limits, points, own, points, other, self._k)
            if found is None:
                return None
            pairs.append((own, found[0], other, found[1]))
        return pairs

    def _bound_by_the_nearest(self, own: slice, other: slice, seen: Tensor) -> None:
        """Bound unknown radii from above: any k + 1 points do, and the nearest by the screen do it well."""
        unknown = self._bound[own].isinf().nonzero().flatten()
        if not len(unknown) or seen.shape[1] <= self._k:
            return
        near = seen[unknown].topk(self._k + 1, largest=False).indices
        of = (unknown + own.start).repeat_interleave(self._k + 1)
        distances = decide(self._points, of, self._points, near.flatten() + other.start)
        self._bound[unknown + own.start] = distances.view(-1, self._k + 1).amax(dim=1)


class Covering:
    """Finds the points of each side that are inside a ball of the other."""

    def __init__(self, r: Points, radii_r: Tensor, s: Points, radii_s: Tensor, screening: Screening) -> None:
        self._r, self._s = r, s
        self._radii_r, self._radii_s = radii_r, radii_s
        self._screening = screening
        self._r_inside, self._s_inside = (
            torch.zeros(len(side.x), dtype=torch.bool, device=side.x.device) for side in (r, s)
        )

    def none(self) -> Tensor:
        """(samples + reference,) bool before anything is found."""
        return torch.zeros(len(self._s.x) + len(self._r.x), dtype=torch.bool, device=self._r.x.device)

    def look(self, rows: slice) -> Tensor:
        """Examine the pairs of these points of the reference with all samples.

        Returns:
            (samples + reference,) bool: the points that are inside a ball, as far as known.
        """
        for columns in slices(0, len(self._s.x), self._screening.tile[1]):
            while not self._look_at(rows, columns):
                pass
        return torch.cat([self._s_inside, self._r_inside])

    def _look_at(self, rows: slice, columns: slice) -> bool:
        """Examine one tile; False after refining the screen, to be called again."""
        r, s, screening = self._r, self._s, self._screening
        seen = screening.seen(r, rows, s, columns)
        of_r = screening.limits(self._radii_r[rows], r, rows, s)
        of_s = screening.limits(self._radii_s[columns], s, columns, r)

        def inside_r(centre: Tensor, point: Tensor) -> Tensor:
            centre, point = centre + rows.start, point + columns.start
            return decide(r, centre, s, point) <= self._radii_r[centre]

        def inside_s(centre: Tensor, point: Tensor) -> Tensor:
            # The reference comes first, as in the reference evaluator: in float16 the order matters.
            centre, point = centre + columns.start, point + rows.start
            return decide(r, point, s, centre) <= self._radii_s[centre]

        return self._mark(seen, of_r, self._s_inside[columns], inside_r) and self._mark(
            seen.T, of_s, self._r_inside[rows], inside_s
        )

    def _mark(
        self, seen: Tensor, limits: Tensor, inside: Tensor, test: Callable[[Tensor, Tensor], Tensor]
    ) -> bool:
        """Set ``inside`` for points (columns) inside a ball around a centre (rows).

        Returns False after refining the screen.
        """
        centre, point = _not_above(seen, limits)
        unclear = ~inside[point]
        centre, point = centre[unclear], point[unclear]
        if not len(point):
            return True
        # Most points that are inside any ball are inside the one they are deepest in by the screen.
        depth = self._screening.values(seen[centre, point]) - self._screening.values(limits[centre])
        deepest = torch.full(inside.shape, torch.inf, dtype=depth.dtype, device=depth.device)
        deepest.scatter_reduce_(0, point, depth, "amin")
        first = depth == deepest[point]
        inside[point[first][test(centre[first], point[first])]] = True
        rest = ~first & ~inside[point]
        centre, point = centre[rest], point[rest]
        if len(point) > _affordable(seen, 1) and self._screening.refine():
            return False
        inside[point[test(centre, point)]] = True
        return True


class Inside:
    """Finds all pairs of a centre and a point of the other side that is strictly inside its ball."""

    def __init__(self, centres: Points, radii: Tensor, points: Points, screening: Screening) -> None:
        self._centres, self._points = centres, points
        self._radii = radii
        self._screening = screening

    def look(self, rows: slice) -> list[tuple[Tensor, Tensor]]:
        """Examine the pairs of these centres with all points.

        Returns:
            Indices of centres and of points, (pairs,) each, in several pieces.
        """
        found = []
        for columns in slices(0, len(self._points.x), self._screening.tile[1]):
            pairs = None
            while pairs is None:
                pairs = self._pairs(rows, columns)
            found.append(pairs)
        return found

    def _pairs(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """The pairs of one tile; None after refining the screen."""
        screening, centres, points = self._screening, self._centres, self._points
        seen = screening.seen(centres, rows, points, columns)
        radii = self._radii[rows]
        # Nothing is strictly inside a ball of radius 0.
        limits = torch.where(radii > 0, radii, -1)
        found = _candidates(screening, seen, limits, centres, rows, points, columns)
        if found is None:
            return None
        i, j = found[0] + rows.start, found[1] + columns.start
        inside = decide(centres, i, points, j) < self._radii[i]
        return i[inside], j[inside]


class Nearest:
    """Finds the nearest point of the other side.

    Args:
        points: Whose nearest are looked for.
        others: Among which.
        screening: The screens of both.
        own: (points,) int64 index of each point among the others, which is passed over; None if the points
            are not among them.
    """

    def __init__(
        self, points: Points, others: Points, screening: Screening, own: Tensor | None = None
    ) -> None:
        self._points, self._others = points, others
        self._screening = screening
        self._own = own

    def look(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Examine the pairs of these points with all of the other side.

        Returns:
            (rows,) index of the nearest, of equally near ones the first, and (rows,) distance to it, infinite
            where there is no other point.
        """
        device = self._points.x.device
        distance = torch.full((rows.stop - rows.start,), torch.inf, dtype=torch.float64, device=device)
        index = torch.zeros_like(distance, dtype=torch.int64)
        for columns in slices(0, len(self._others.x), self._screening.tile[1]):
            pairs = None
            while pairs is None:
                pairs = self._pairs(rows, columns, distance)
            i, j = pairs[0], pairs[1] + columns.start
            found = decide(self._points, i + rows.start, self._others, j)
            nearest = torch.full_like(distance, torch.inf).scatter_reduce_(0, i, found, "amin")
            first = torch.full_like(index, len(self._others.x))
            is_nearest = found == nearest[i]
            first.scatter_reduce_(0, i[is_nearest], j[is_nearest], "amin")
            index = torch.where(nearest < distance, first, index)
            distance = torch.minimum(distance, nearest)
        return index, distance

    def _pairs(self, rows: slice, columns: slice, distance: Tensor) -> tuple[Tensor, Tensor] | None:
        """Pairs that may be nearer, as indices into two ranges; None after refining the screen."""
        screening, points, others = self._screening, self._points, self._others
        seen = screening.seen(points, rows, others, columns)
        i = torch.arange(rows.start, rows.stop, device=distance.device)
        if self._own is not None:
            own = self._own[rows]
            here = (own >= columns.start) & (own < columns.stop)
            seen[here, own[here] - columns.start] = torch.iinfo(seen.dtype).max
        by_screen = decide(points, i, others, seen.argmin(dim=1) + columns.start)
        bound = torch.minimum(distance, by_screen)
        return _candidates(screening, seen, bound, points, rows, others, columns)


def _candidates(
    screening: Screening,
    seen: Tensor,
    t: Tensor,
    a: Points,
    rows: slice,
    b: Points,
    columns: slice,
    k: int = 1,
) -> tuple[Tensor, Tensor] | None:
    """Pairs of one tile that may be decided as at most ``t``; None after refining the screen.

    Args:
        screening: The screen.
        seen: (rows, columns) what it gives for the points of ``a`` and of ``b``.
        t: (rows,) squared distances; where it is negative, there is no pair.
        a: Points of the rows.
        rows: Which of them.
        b: Points of the columns.
        columns: Which of them.
        k: Neighbours of each point that are looked for.

    Returns:
        Indices into the two ranges, (pairs,) each.
    """
    i, j = _not_above(seen, screening.limits(t, a, rows, b))
    near = screening.near_enough(seen[i, j], t[i], a, i + rows.start, b, j + columns.start)
    i, j = i[near], j[near]
    if len(i) > _affordable(seen, k) and screening.refine():
        return None
    return i, j


def _not_above(seen: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, ascending, and columns of the entries of an (m, n) matrix up to their row's limit."""
    m, n = seen.shape
    if n % _GROUP:
        return _nonzero(seen <= limits[:, None])
    # There are few such entries: the minimum of a group rules out most.
    groups = seen.view(m, _GROUP, n // _GROUP)
    # For the transpose of a contiguous matrix, reducing that matrix is many times as fast.
    transposed = seen.T.view(_GROUP, n // _GROUP, m) if seen.T.is_contiguous() else None
    minima = groups.amin(dim=1) if transposed is None else transposed.amin(dim=0).T
    i, group = _nonzero(minima <= limits[:, None])
    pair, member = _nonzero(groups[i, :, group] <= limits[i, None])
    return i[pair], member * (n // _GROUP) + group[pair]


def _nonzero(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the true entries; on a CPU several times as fast as ``mask.nonzero()``."""
    flat = (
        torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.is_cpu else mask.flatten().nonzero().flatten()
    )
    return flat.div(mask.shape[1], rounding_mode="floor"), flat % mask.shape[1]


def _affordable(seen: Tensor, k: int) -> int:
    """How many pairs of a tile may be decided one by one."""
    return max(int(_SURVIVORS * seen.numel()), 8 * (k + 1) * len(seen))


def _insert(nearest: Tensor, i: Tensor, distances: Tensor) -> None:
    """Merge the distances of points ``i`` into their rows of ``nearest``, keeping the smallest."""
    if not len(i):
        return
    points, counts = torch.unique_consecutive(i, return_counts=True)
    group = torch.arange(len(points), device=i.device).repeat_interleave(counts)
    position = torch.arange(len(i), device=i.device) - (counts.cumsum(0) - counts)[group]
    new = nearest.new_full((len(points), int(counts.max())), torch.inf)
    new[group, position] = distances
    nearest[points] = smallest(nearest[points], new)


def smallest(a: Tensor, b: Tensor) -> Tensor:
    """The c smallest of each row of ``a``, (n, c), and ``b`` together: (n, c), ascending."""
    return torch.cat([a, b], dim=1).topk(a.shape[1], dim=1, largest=False).values
