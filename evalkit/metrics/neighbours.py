"""Improved precision and recall: how many samples lie on the reference manifold, and the other way round.

Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models". A manifold
is the union of balls around its points, each reaching to the point's k-th nearest neighbour.

Only comparisons of distances matter, and most are clear at a glance. So a cheap *screen* bounds all
distances from below, by products in few bits, and the few pairs that it cannot rule out are *decided* one by
one, in float64 or in the emulated float16 arithmetic. The margins of the screen are worst-case bounds of its
rounding, so the result is that of deciding every pair. A product serves both of its points: of the pairs
within a set one half is seen, and those between the sets are seen once for precision and recall.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.metrics.base import FeatureSet, Layer, Progress, Spread, check_features, required_features
from evalkit.results import Score

__all__ = ["Arithmetic", "PrecisionRecall", "precision_recall"]

Arithmetic: TypeAlias = Literal["float16", "exact"]

# The reference evaluator's blocks; one overflow sends a whole block of them to float32.
_REFERENCE_BLOCK = 10_000

# Entries of a block of features that are converted at a time.
_BLOCK_ENTRIES = 2**22

# Rows and columns of the products that are looked at in one go: on a CPU they stay in its caches.
_CPU_TILE = (1024, 2048)
_GPU_TILE = (4096, 8192)

# The share of pairs worth deciding one by one; where more survive a screen, the next finer one is used.
_SURVIVORS = 0.01

# Entries of a row that are looked at through their minimum.
_GROUP = 16

# Entries of the features of pairs that are decided in one go on a CPU; torch uses threads from 2^15 on.
_CPU_ENTRIES = 2**15 - 1


def precision_recall(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    *,
    k: int = 3,
    arithmetic: Arithmetic = "exact",
    device: str = "cpu",
    progress: Progress | None = None,
    spread: Spread | None = None,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 to 3).

    A ball's squared radius is entry k of its point's sorted squared distances to all points of its set
    (entry 0 is the point itself); points on the sphere are inside.

    Args:
        reference: (n, d) float32 features.
        samples: (m, d) float32 features.
        k: Which nearest neighbour a ball reaches to.
        arithmetic: ``"exact"`` compares squared distances ``|u - v|^2`` in float64. ``"float16"`` compares
            ``max(|u|^2 - 2uv + |v|^2, 0)`` as the reference evaluator rounds it: features, squares, sums,
            product and differences in float16, norms summed in the order of TensorFlow's CPU kernel,
            products accumulated in higher precision and rounded once; a block of 10,000 x 10,000 with an
            overflow is done in float32 instead.
        device: torch device of the computation; one without float64 is replaced by the CPU.
        progress: Called with the rows done and the rows in total.
        spread: Shares the work between processes that all do this.

    Returns:
        The share of samples inside a ball of the reference, and of the reference inside one of the samples.

    Raises:
        UndefinedMetricError: A side has no more than k rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
        InputError: `k` is not positive.
    """
    _check(reference, samples, k)
    target = torch.device("cpu" if device.startswith("mps") else device)
    r, s = (torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(target) for x in (reference, samples))
    with torch.inference_mode(), _full_float32():
        if arithmetic == "exact":
            scale = _safe_scale(r, s)
            if scale != 1:
                r, s = r * scale, s * scale
            return _screened(_Exact(r), _Exact(s), k, progress, spread)
        half_r, half_s = _Float16(r), _Float16(s)
        if _may_overflow(half_r, half_s):
            return _brute_force_float16(r, s, k)
        return _screened(half_r, half_s, k, progress, spread)


def _check(reference: NDArray[np.float32], samples: NDArray[np.float32], k: int) -> None:
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1, the nearest neighbour")
    for name, features in (("reference", reference), ("samples", samples)):
        check_features(features, name)
        if len(features) <= k:
            raise UndefinedMetricError(
                f"precision and recall with k = {k} are undefined for {len(features)} images ({name}); "
                f"give at least {k + 1}, better 10,000 images"
            )
    if reference.shape[1] != samples.shape[1]:
        raise FeatureError(
            f"features of {reference.shape[1]} and of {samples.shape[1]} dimensions cannot be compared; "
            "use the same layer of the same extractor for both"
        )


def _safe_scale(r: Tensor, s: Tensor) -> float:
    """A power of two that brings the features where float32 squares neither overflow nor vanish."""
    largest = max(float(x.abs().max()) for x in (r, s))
    if largest == 0 or 2.0**-20 < largest < 2.0**40:
        return 1.0
    return 2.0 ** -max(-126, min(126, math.frexp(largest)[1]))


@contextmanager
def _full_float32() -> Iterator[None]:
    """Float32 products without TF32 or bfloat16, which would break the margins."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


# ---------------------------------------------------------------------------------------------- deciding


class _Points(Protocol):
    """The points of one side in the arithmetic that decides.

    Attributes:
        x: (n, d) points that are exactly representable in float32.
        slack: (n,) float64; a decided distance of at most t means ``|x_i - x_j|^2 <= t (1 + 2^-9) +
            slack_i + slack_j``.
    """

    x: Tensor
    slack: Tensor

    def distances(self, i: Tensor, other: _Points, j: Tensor) -> Tensor:
        """(pairs,) float64 squared distances of own points i to the other's points j, in this order."""


class _Exact:
    """Squared distances of float32 points in float64."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.slack = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def distances(self, i: Tensor, other: _Points, j: Tensor) -> Tensor:
        difference = self.x.index_select(0, i).double()
        difference -= other.x.index_select(0, j)
        return difference.square_().sum(dim=1)


class _Float16:
    """Squared distances as the reference evaluator's float16 graph rounds them."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.half()
        self.norms = _float16_norms(self.x)
        true_norms = torch.cat(
            [b.double().square().sum(dim=1) for b in torch.split(self.x, _rows(x.shape[1]))]
        )
        # Product and first difference are off by at most 2^-11 of |u|^2 + |v|^2 each, the norms by what
        # they are off; 2^-22 covers results that are subnormal.
        self.slack = 2.1 * 2**-11 * true_norms - (self.norms.double() - true_norms) + 2**-22

    def distances(self, i: Tensor, other: _Points, j: Tensor) -> Tensor:
        assert isinstance(other, _Float16)
        product = self.x.index_select(0, i).float()
        product *= other.x.index_select(0, j).float()  # of two float16: exact in float32
        return _float16_distance(self.norms[i], product.double().sum(dim=1), other.norms[j])


def _float16_distance(u_norms: Tensor, product: Tensor, v_norms: Tensor) -> Tensor:
    """``max(|u|^2 - 2uv + |v|^2, 0)``, rounded to float16 after every operation, from an exact product."""
    distance: Tensor = (u_norms - 2 * product.half() + v_norms).clamp(min=0).double()
    return distance


def _float16_norms(x: Tensor) -> Tensor:
    """(n,) float16 sums of squares of (n, d) float16, in the order of TensorFlow's CPU kernel.

    Eigen halves more than 1600 numbers, adds each part up in four registers of eight partial sums, joins
    the registers in float16 and their lanes in float32. Checked for d = 2048; other widths are padded.
    """
    if x.shape[1] > 1600:
        left, right = x.tensor_split(2, dim=1)
        return _float16_norms(left) + _float16_norms(right)
    squares = torch.nn.functional.pad(x * x, (0, -x.shape[1] % 32)).view(len(x), -1, 4, 8)
    sums = squares[:, 0]
    for step in range(1, squares.shape[1]):
        sums = sums + squares[:, step]
    a, b, c, d = sums.unbind(dim=1)
    return (((a + b) + c) + d).float().sum(dim=1).half()


def _decide(a: _Points, i: Tensor, b: _Points, j: Tensor) -> Tensor:
    """(pairs,) float64 squared distances of points i of `a` to points j of `b`."""
    # Few numbers at a time fit the cache, and stay below what torch spreads over threads: waking threads for
    # every chunk costs more than the work, and much more where other processes hold the cores.
    entries = _CPU_ENTRIES if i.is_cpu else _BLOCK_ENTRIES
    size = max(1, entries // a.x.shape[1])
    distances = torch.empty(len(i), dtype=torch.float64, device=i.device)
    for start in range(0, len(i), size):
        chunk = slice(start, start + size)
        distances[chunk] = a.distances(i[chunk], b, j[chunk])
    return distances


# --------------------------------------------------------------------------------------------- screening


_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers in whose order the bits of not negative numbers of these types are."""

# Columns that a view has beside those of the points.
_NORM_PARTS = 3
_ALIGNMENT = 32


@dataclass(frozen=True, eq=False)
class _Screen:
    """A way to see all distances cheaply, and how wrong it can be.

    Attributes:
        centre: (d,) float32 that is subtracted, against cancellation.
        dtype: Of the points and of what is seen; products are accumulated in float32 or float64.
    """

    centre: Tensor
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """Of centred points and of accumulated products."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def error(self) -> float:
        """Bound of the error of an accumulated ``|p|^2 + |q|^2 - 2pq``, relative to ``|p|^2 + |q|^2``.

        Of norms that are rounded to a sum of three numbers of `dtype`, too.
        """
        return (len(self.centre) + 2 * _NORM_PARTS + 16) * torch.finfo(self.wide).eps

    def view(self, points: _Points) -> _View:
        n, d = points.x.shape
        epsilon = torch.finfo(self.wide).eps
        width = d + 2 * _NORM_PARTS
        right = torch.zeros(n, width + -width % _ALIGNMENT, dtype=self.dtype, device=points.x.device)
        displacement = torch.empty(n, dtype=torch.float64, device=right.device)
        for rows in torch.split(torch.arange(n, device=right.device), _rows(d)):
            centred = points.x[rows].to(self.wide) - self.centre
            right[rows, :d] = centred.to(self.dtype)
            seen = right[rows, :d].double()
            norms = seen.square().sum(dim=1)
            displacement[rows] = (seen - centred).norm(dim=1) + epsilon * norms.sqrt()
            rest = (1 - self.error) * norms
            for part in range(_NORM_PARTS):
                right[rows, d + part] = rest.to(self.dtype)
                rest = rest - right[rows, d + part]
        right[:, d + _NORM_PARTS : width] = 1
        return _View(right, d, displacement)


@dataclass(frozen=True, eq=False)
class _View:
    """Points as a screen sees them, so that one product gives squared distances, never too large.

    Attributes:
        right: (n, w) in the screen's dtype: the centred points q, their squared norms (a little less than
            that) in three parts, and as many ones; then zeros.
        d: Columns of q.
        displacement: (n,) float64; ``|q_i - q_j| <= |x_i - x_j| + displacement_i + displacement_j``.
    """

    right: Tensor
    d: int
    displacement: Tensor

    def left(self, rows: slice) -> Tensor:
        """(rows, w) whose product with ``right`` of another view, transposed, is ``|q_i - q_j|^2``."""
        right = self.right[rows]
        norms, ones = (right[:, self.d + start :][:, :_NORM_PARTS] for start in (0, _NORM_PARTS))
        rest = right[:, self.d + 2 * _NORM_PARTS :]
        return torch.cat([-2 * right[:, : self.d], ones, norms, rest], dim=1)


def _rows(columns: int) -> int:
    """How many rows of so many columns make a block."""
    return max(256, min(1024, _BLOCK_ENTRIES // columns))


def _screens(reference: _Points) -> list[_Screen]:
    """From fast to fine."""
    # The median, because one outlier would pull the mean away from all other points.
    x = reference.x
    centre = x[:: max(1, len(x) // 1024)].float().median(dim=0).values
    dtypes = dict.fromkeys([_fast_dtype(centre.device), torch.float32, torch.float64])
    return [_Screen(centre, dtype) for dtype in dtypes]


@functools.cache
def _fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the first screen: bfloat16 where this processor multiplies it faster, as AMX does."""
    if device.type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a.T
        start = time.perf_counter()
        for _ in range(3):
            a @ a.T
        seconds[dtype] = time.perf_counter() - start
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


def _grown(t: Tensor, slack: Tensor | float, displacement: Tensor | float) -> Tensor:
    """Squared distance in a view that a decided distance of at most t cannot exceed.

    The last two terms cover the rounding of scores to float32, and products that underflow.
    """
    root = (t * (1 + 2**-9) + slack).clamp(min=0).sqrt() + displacement
    return root.square() * (1 + 2**-20) + 2**-100


# --------------------------------------------------------------------------------------------- the metric


class _Screening:
    """The screens of one comparison, and the views of its sides, each made when first needed."""

    def __init__(self, reference: _Points) -> None:
        self._screens = _screens(reference)
        self._level = 0
        self._views: dict[tuple[int, int], _View] = {}
        self._left: tuple[tuple[int, int, int], Tensor] | None = None
        self._buffers: dict[torch.dtype, Tensor] = {}
        device = self._screens[0].centre.device
        self.tile = _CPU_TILE if device.type == "cpu" else _GPU_TILE

    def begin(self) -> None:
        """Back to the fast screen."""
        self._level = 0

    def refine(self) -> bool:
        """On to the next finer screen, if there is one."""
        finer = self._level + 1 < len(self._screens)
        self._level += finer
        return finer

    def seen(self, a: _Points, rows: slice, b: _Points, columns: slice) -> Tensor:
        """(rows, columns) squared distances, as integers whose order is theirs; valid until the next."""
        key = (id(a), rows.start, self._level)
        if self._left is None or self._left[0] != key:
            self._left = key, self._view(a).left(rows)
        left, right = self._left[1], self._view(b).right[columns]
        seen = torch.mm(left, right.T, out=self._buffer(len(left), len(right), left.dtype))
        return seen.view(_BITS[seen.dtype])

    def limits(self, t: Tensor, a: _Points, rows: slice, b: _Points) -> Tensor:
        """(rows,) the most that is seen of a distance from points of `a` to one of `b`, if decided as t.

        Where t is negative no distance is so small.
        """
        displacement = self._view(a).displacement[rows] + self._view(b).displacement.max()
        limits = _grown(t.clamp(min=0), a.slack[rows] + b.slack.max(), displacement)
        dtype = self._screens[self._level].dtype
        limits = limits * (1 + torch.finfo(dtype).eps / 2)  # what is seen was rounded to nearest
        rounded = limits.to(dtype)
        bits = rounded.view(_BITS[dtype])
        bits = bits + (rounded.double() < limits)  # the next number
        return torch.where(t < 0, torch.iinfo(bits.dtype).min, bits)

    def near_enough(self, seen: Tensor, t: Tensor, a: _Points, i: Tensor, b: _Points, j: Tensor) -> Tensor:
        """(pairs,) bool: whether what is :meth:`seen` of these pairs can be, if they are decided as t.

        :meth:`limits` knows one point alone, and allows for the worst of the other side.
        """
        slack, displacement = a.slack[i] + b.slack[j], self._view(a).displacement[i]
        limits = _grown(t, slack, displacement + self._view(b).displacement[j])
        epsilon = torch.finfo(self._screens[self._level].dtype).eps
        return self.values(seen).double() <= limits * (1 + epsilon)

    def values(self, seen: Tensor) -> Tensor:
        """What :meth:`seen` or :meth:`limits` gave, as float32."""
        return seen.view(self._screens[self._level].dtype).float()

    def _view(self, points: _Points) -> _View:
        key = (id(points), self._level)
        if key not in self._views:
            self._views[key] = self._screens[self._level].view(points)
        return self._views[key]

    def _buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory that is used again and again: fresh pages cost more than the arithmetic."""
        if dtype not in self._buffers:
            entries = math.prod(self.tile)
            self._buffers[dtype] = torch.empty(entries, dtype=dtype, device=self._screens[0].centre.device)
        return self._buffers[dtype][: rows * columns].view(rows, columns)


def _screened(
    r: _Points, s: _Points, k: int, progress: Progress | None, spread: Spread | None
) -> tuple[float, float]:
    """Precision and recall without overflow of the deciding arithmetic."""
    done, total = 0, 2 * len(r.x) + len(s.x)
    screening = _Screening(r)

    def report(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    def stripes(points: _Points, name: str, look: Callable[[slice], Tensor]) -> Iterator[Tensor]:
        """What is found looking along stripes of rows of the product, which processes can share."""
        before, n = done, len(points.x)
        parts = list(_slices(0, n, screening.tile[0]))

        def work(index: int) -> NDArray[Any]:
            screening.begin()
            found = look(parts[index]).cpu().numpy()
            report(parts[index].stop - parts[index].start)
            return found

        for found in (spread or _alone)(name, len(parts), work):
            yield torch.from_numpy(found).to(points.x.device)
        if others := before + n - done:
            report(others)

    def radii(points: _Points, name: str) -> Tensor:
        neighbours = _Neighbours(points, k, screening)
        nearest = neighbours.none()
        for found in stripes(points, name, neighbours.look):
            nearest = _smallest(nearest, found)
        return nearest[:, k]

    covering = _Covering(r, radii(r, "radii-reference"), s, radii(s, "radii-samples"), screening)
    inside = torch.zeros(len(s.x) + len(r.x), dtype=torch.bool, device=r.x.device)
    for found in stripes(r, "inside", covering.look):
        inside |= found
    return float(inside[: len(s.x)].double().mean()), float(inside[len(s.x) :].double().mean())


def _alone(name: str, count: int, work: Callable[[int], NDArray[Any]]) -> Iterator[NDArray[Any]]:
    del name
    return map(work, range(count))


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


class _Neighbours:
    """The search for the k nearest neighbours of all points of a side, and for the points themselves.

    Of each pair of stripes of points one product is looked at, for the neighbours of either.
    """

    def __init__(self, points: _Points, k: int, screening: _Screening) -> None:
        self._points = points
        self._k = k
        self._screening = screening
        self._nearest = self.none()
        # (n,) no radius is larger; of points that this process has looked at.
        self._bound = self._nearest[:, k].clone()

    def none(self) -> Tensor:
        """(n, k + 1) distances before anything is found."""
        shape = len(self._points.x), self._k + 1
        return torch.full(shape, torch.inf, dtype=torch.float64, device=self._points.x.device)

    def look(self, rows: slice) -> Tensor:
        """(n, k + 1) ascending decided distances, of pairs of these points with themselves and later ones.

        Larger ones than the (k + 1)-th of all may be missing, and stand as infinity.
        """
        found = self.none()
        for columns in (rows, *_slices(rows.stop, len(self._points.x), self._screening.tile[1])):
            pairs = None
            while pairs is None:
                pairs = self._pairs(rows, columns)
            for own, i, other, j in pairs:
                distances = _decide(self._points, i + own.start, self._points, j + other.start)
                _insert(found[own], i, distances)
            self._bound[rows] = torch.minimum(self._bound[rows], found[rows, self._k])
        found[self._bound == 0] = 0
        self._nearest = _smallest(self._nearest, found)
        self._bound = torch.minimum(self._bound, self._nearest[:, self._k])
        return found

    def _pairs(self, rows: slice, columns: slice) -> list[tuple[slice, Tensor, slice, Tensor]] | None:
        """Pairs that may be neighbours, counted from the beginnings of two ranges; None: look more finely."""
        screening, points = self._screening, self._points
        seen = screening.seen(points, rows, points, columns)
        sides = [(rows, columns, seen)]
        if rows != columns:
            sides.append((columns, rows, seen.T))
        pairs = []
        for own, other, matrix in sides:
            self._bound_by_the_nearest(own, other, matrix)
            bound = self._bound[own]
            # A radius of 0 cannot shrink: duplicates need not be compared with each other.
            limits = screening.limits(torch.where(bound > 0, bound, -1), points, own, points)
            i, j = _not_above(matrix, limits)
            near = screening.near_enough(
                matrix[i, j], bound[i], points, i + own.start, points, j + other.start
            )
            i, j = i[near], j[near]
            if len(i) > _affordable(matrix, self._k) and screening.refine():
                return None
            pairs.append((own, i, other, j))
        return pairs

    def _bound_by_the_nearest(self, own: slice, other: slice, seen: Tensor) -> None:
        """Any k + 1 points bound a radius from above; the nearest that are seen bound it well."""
        unknown = self._bound[own].isinf().nonzero().flatten()
        if not len(unknown) or seen.shape[1] <= self._k:
            return
        near = seen[unknown].topk(self._k + 1, largest=False).indices
        of = (unknown + own.start).repeat_interleave(self._k + 1)
        distances = _decide(self._points, of, self._points, near.flatten() + other.start)
        self._bound[unknown + own.start] = distances.view(-1, self._k + 1).amax(dim=1)


class _Covering:
    """The search for points of each side inside a ball of the other."""

    def __init__(
        self, r: _Points, radii_r: Tensor, s: _Points, radii_s: Tensor, screening: _Screening
    ) -> None:
        self._r, self._s = r, s
        self._radii_r, self._radii_s = radii_r, radii_s
        self._screening = screening
        self._r_inside, self._s_inside = (
            torch.zeros(len(side.x), dtype=torch.bool, device=side.x.device) for side in (r, s)
        )

    def look(self, rows: slice) -> Tensor:
        """(samples + reference,) bool: those found inside by pairs of these points of the reference."""
        for columns in _slices(0, len(self._s.x), self._screening.tile[1]):
            while not self._look_at(rows, columns):
                pass
        return torch.cat([self._s_inside, self._r_inside])

    def _look_at(self, rows: slice, columns: slice) -> bool:
        """Whether this screen was fine enough."""
        r, s, screening = self._r, self._s, self._screening
        seen = screening.seen(r, rows, s, columns)
        of_r = screening.limits(self._radii_r[rows], r, rows, s)
        of_s = screening.limits(self._radii_s[columns], s, columns, r)

        def inside_r(centre: Tensor, point: Tensor) -> Tensor:
            centre, point = centre + rows.start, point + columns.start
            return _decide(r, centre, s, point) <= self._radii_r[centre]

        def inside_s(centre: Tensor, point: Tensor) -> Tensor:
            # The reference comes first, as in the reference evaluator: in float16 this matters.
            centre, point = centre + columns.start, point + rows.start
            return _decide(r, point, s, centre) <= self._radii_s[centre]

        return self._mark(seen, of_r, self._s_inside[columns], inside_r) and self._mark(
            seen.T, of_s, self._r_inside[rows], inside_s
        )

    def _mark(
        self, seen: Tensor, limits: Tensor, inside: Tensor, test: Callable[[Tensor, Tensor], Tensor]
    ) -> bool:
        """Set `inside` for points, the columns, in a ball around a centre, the rows; False: see above."""
        centre, point = _not_above(seen, limits)
        unclear = ~inside[point]
        centre, point = centre[unclear], point[unclear]
        if not len(point):
            return True
        # Most points that are inside are inside the most promising ball.
        depth = self._screening.values(seen[centre, point]) - self._screening.values(limits[centre])
        deepest = torch.full(inside.shape, torch.inf, device=depth.device)
        deepest.scatter_reduce_(0, point, depth, "amin")
        first = depth == deepest[point]
        inside[point[first][test(centre[first], point[first])]] = True
        rest = ~first & ~inside[point]
        centre, point = centre[rest], point[rest]
        if len(point) > _affordable(seen, 1) and self._screening.refine():
            return False
        inside[point[test(centre, point)]] = True
        return True


def _not_above(seen: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Row, ascending, and column of the entries of an (m, n) matrix that are not above the row's limit."""
    m, n = seen.shape
    if n % _GROUP:
        return _nonzero(seen <= limits[:, None])
    # Few entries are: most are ruled out by the minimum of a group.
    groups = seen.view(m, _GROUP, n // _GROUP)
    # Of the transpose of a contiguous matrix, reducing that is many times as fast.
    transposed = seen.T.view(_GROUP, n // _GROUP, m) if seen.T.is_contiguous() else None
    minima = groups.amin(dim=1) if transposed is None else transposed.amin(dim=0).T
    i, group = _nonzero(minima <= limits[:, None])
    pair, member = _nonzero(groups[i, :, group] <= limits[i, None])
    return i[pair], member * (n // _GROUP) + group[pair]


def _nonzero(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the true entries; several times as fast as ``mask.nonzero()`` on a CPU."""
    flat = (
        torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.is_cpu else mask.flatten().nonzero().flatten()
    )
    return flat.div(mask.shape[1], rounding_mode="floor"), flat % mask.shape[1]


def _affordable(seen: Tensor, k: int) -> int:
    """How many pairs of a tile may be decided one by one."""
    return max(int(_SURVIVORS * seen.numel()), 8 * (k + 1) * len(seen))


def _insert(nearest: Tensor, i: Tensor, distances: Tensor) -> None:
    """Keep, in each row of `nearest`, the smallest of what it holds and the distances of point `i`."""
    if not len(i):
        return
    points, counts = torch.unique_consecutive(i, return_counts=True)
    group = torch.arange(len(points), device=i.device).repeat_interleave(counts)
    position = torch.arange(len(i), device=i.device) - (counts.cumsum(0) - counts)[group]
    new = nearest.new_full((len(points), int(counts.max())), torch.inf)
    new[group, position] = distances
    nearest[points] = _smallest(nearest[points], new)


def _smallest(a: Tensor, b: Tensor) -> Tensor:
    """(n, c) the c smallest of each row of `a`, (n, c), and `b` together, ascending."""
    return torch.cat([a, b], dim=1).topk(a.shape[1], dim=1, largest=False).values


# ------------------------------------------------------------------------------------- float16 overflow


def _may_overflow(r: _Float16, s: _Float16) -> bool:
    """Whether an operation of the float16 distance can exceed 65504."""
    largest = torch.cat([r.norms, s.norms]).double().max()
    # (|u| + |v|)^2 bounds every operand.
    return not bool(4 * largest < 60_000)


def _brute_force_float16(r: Tensor, s: Tensor, k: int) -> tuple[float, float]:
    """Precision and recall from all distances, with the reference evaluator's blocks and their overflow."""
    radii_r, radii_s = (
        torch.cat(
            [
                torch.cat(
                    [_reference_block(rows, columns) for columns in torch.split(x, _REFERENCE_BLOCK)], dim=1
                )
                .kthvalue(k + 1, dim=1)
                .values
                for rows in torch.split(x, _REFERENCE_BLOCK)
            ]
        )
        for x in (r, s)
    )
    samples_inside = torch.zeros(len(s), dtype=torch.bool, device=s.device)
    reference_inside = torch.zeros(len(r), dtype=torch.bool, device=r.device)
    for i in torch.split(torch.arange(len(r), device=r.device), _REFERENCE_BLOCK):
        for j in torch.split(torch.arange(len(s), device=s.device), _REFERENCE_BLOCK):
            distances = _reference_block(r[i], s[j])
            samples_inside[j] |= (distances <= radii_r[i, None]).any(dim=0)
            reference_inside[i] |= (distances <= radii_s[j]).any(dim=1)
    return float(samples_inside.double().mean()), float(reference_inside.double().mean())


def _reference_block(u: Tensor, v: Tensor) -> Tensor:
    """(rows, columns) float32 squared distances of one block: in float16, or in float32 on overflow."""
    half_u, half_v = u.half(), v.half()
    u_norms, v_norms = _float16_norms(half_u), _float16_norms(half_v)
    wide_v = half_v.double().T
    distances = torch.cat(
        [
            _float16_distance(norms[:, None], rows.double() @ wide_v, v_norms).float()
            for rows, norms in zip(
                torch.split(half_u, _rows(len(v))), torch.split(u_norms, _rows(len(v))), strict=True
            )
        ]
    )
    if distances.isfinite().all():
        return distances
    distances = torch.addmm(v.square().sum(dim=1), u, v.T, alpha=-2)
    return distances.add_(u.square().sum(dim=1)[:, None]).clamp_(min=0)


@dataclass(frozen=True)
class PrecisionRecall:
    """Improved precision and recall of the samples, on pool features; see :func:`precision_recall`."""

    names: ClassVar[tuple[str, ...]] = ("precision", "recall")
    layers: ClassVar[tuple[Layer, ...]] = ("pool",)
    shared: ClassVar[bool] = True

    k: int = 3
    arithmetic: Arithmetic = "exact"

    def __call__(
        self,
        reference: FeatureSet,
        samples: FeatureSet,
        *,
        device: str = "cpu",
        progress: Progress | None = None,
        spread: Spread | None = None,
    ) -> tuple[Score, ...]:
        """Two scores, ``"precision"`` and ``"recall"``, shares in [0, 1]; higher is better.

        Raises:
            UndefinedMetricError: A side has no pool features, or no more than k images.
            FeatureError: The sides do not fit together.
        """
        values = precision_recall(
            required_features(reference, "pool"),
            required_features(samples, "pool"),
            k=self.k,
            arithmetic=self.arithmetic,
            device=device,
            progress=progress,
            spread=spread,
        )
        return tuple(
            Score(name=name, value=value, better="higher", parameters=asdict(self))
            for name, value in zip(self.names, values, strict=True)
        )
