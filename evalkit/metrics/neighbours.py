"""Improved precision and recall: how many samples lie on the reference manifold, and the other way round.

Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models". A manifold
is the union of balls around its points, each reaching to the point's k-th nearest neighbour.

Only comparisons of distances matter, and most are clear at a glance. So a cheap *screen* bounds all
distances from below, by products in few bits, and the few pairs that it cannot rule out are *decided* one by
one, in float64 or in the emulated float16 arithmetic. The margins of the screen are worst-case bounds of its
rounding, so the result is that of deciding every pair.
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

# Entries of a block of screened distances: 16 MiB of float32, or 256 rows where those are more.
_BLOCK_ENTRIES = 2**22

# Blocks that one process does at a time where several share the work.
_BLOCKS_IN_A_PIECE = 4

# The share of pairs worth deciding one by one; where more survive a screen, the next finer one is used.
_SURVIVORS = 0.01

# Columns of a block whose scores are looked at through their minimum.
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


@dataclass(frozen=True, eq=False)
class _Screen:
    """A way to see all distances cheaply, and how wrong it can be.

    Attributes:
        centre: (d,) float32 that is subtracted, against cancellation.
        dtype: Of the points and of their products, which are accumulated in float32 or float64.
    """

    centre: Tensor
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """Of centred points, of accumulated products and of scores."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def error(self) -> float:
        """Bound of the error of a computed ``|p|^2 + |q|^2 - 2pq``, relative to ``|p|^2 + |q|^2``."""
        accumulation = (len(self.centre) + 16) * torch.finfo(self.wide).eps
        return accumulation + (0.0 if self.dtype == self.wide else torch.finfo(self.dtype).eps / 2)

    def view(self, points: _Points) -> _View:
        n, d = points.x.shape
        epsilon = torch.finfo(self.wide).eps
        q = torch.empty(n, d, dtype=self.dtype, device=points.x.device)
        norms, displacement = (torch.empty(n, dtype=torch.float64, device=q.device) for _ in range(2))
        for rows in torch.split(torch.arange(n, device=q.device), _rows(d)):
            centred = points.x[rows].to(self.wide) - self.centre
            q[rows] = centred.to(self.dtype)
            seen = q[rows].double()
            norms[rows] = seen.square().sum(dim=1)
            displacement[rows] = (seen - centred).norm(dim=1) + epsilon * norms[rows].sqrt()
        return _View(q, norms, displacement)


@dataclass(frozen=True, eq=False)
class _View:
    """Points as a screen sees them.

    Attributes:
        q: (n, d) centred points in the screen's dtype.
        norms: (n,) float64 squared norms of `q`.
        displacement: (n,) float64; ``|q_i - q_j| <= |x_i - x_j| + displacement_i + displacement_j``.
    """

    q: Tensor
    norms: Tensor
    displacement: Tensor


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
    """The screens of one comparison, and the views of its sides, each made when first needed.

    Attributes:
        screens: From fast to fine.
        level: The one in use.
    """

    def __init__(self, reference: _Points) -> None:
        self.screens = _screens(reference)
        self.level = 0
        self._views: dict[tuple[int, int], _View] = {}
        self._buffers: dict[torch.dtype, Tensor] = {}

    def view(self, points: _Points, level: int) -> _View:
        key = (id(points), level)
        if key not in self._views:
            self._views[key] = self.screens[level].view(points)
        return self._views[key]

    def scores(self, q: Tensor, centres: Tensor, weights: Tensor) -> _Scores:
        """``weights - 2 q centres^T`` in float32, or the points' float64; valid until the next."""
        rows, columns = len(q), len(centres)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = self._buffer(rows, columns + -columns % _GROUP, dtype)
        scores[:, columns:] = torch.inf
        if q.dtype == dtype:
            torch.addmm(weights.to(dtype), q, centres.T, alpha=-2, out=scores[:, :columns])
        else:
            product = torch.mm(q, centres.T, out=self._buffer(rows, columns, q.dtype))
            torch.add(weights.to(dtype), product, alpha=-2, out=scores[:, :columns])
        groups = scores.view(rows, _GROUP, -1)
        return _Scores(groups, groups.amin(dim=1))

    def _buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory that is used again and again: fresh pages cost more than the arithmetic."""
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = torch.empty(rows * columns, dtype=dtype, device=self.screens[0].centre.device)
            self._buffers[dtype] = buffer
        return buffer[: rows * columns].view(rows, columns)


def _screened(
    r: _Points, s: _Points, k: int, progress: Progress | None, spread: Spread | None
) -> tuple[float, float]:
    """Precision and recall without overflow of the deciding arithmetic."""
    done, total = 0, 2 * (len(r.x) + len(s.x))
    screening = _Screening(r)

    def report(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    def of_all(points: _Points, columns: int, name: str, find: Callable[[Tensor], Tensor]) -> Tensor:
        """What is to be found of all points, in pieces that processes can share."""
        before, device = done, points.x.device
        screening.level = 0
        pieces = torch.split(torch.arange(len(points.x), device=device), _BLOCKS_IN_A_PIECE * _rows(columns))
        found = (spread or _alone)(name, len(pieces), lambda index: find(pieces[index]).cpu().numpy())
        result = torch.from_numpy(np.concatenate(list(found))).to(device)
        if others := before + len(points.x) - done:
            report(others)
        return result

    def radii(points: _Points, name: str) -> Tensor:
        return of_all(points, len(points.x), name, lambda rows: _radii(points, rows, k, screening, report))

    radii_r, radii_s = radii(r, "radii-reference"), radii(s, "radii-samples")
    samples_inside = of_all(
        s, len(r.x), "samples", lambda rows: _covered(s, rows, r, radii_r, True, screening, report)
    )
    reference_inside = of_all(
        r, len(s.x), "reference", lambda rows: _covered(r, rows, s, radii_s, False, screening, report)
    )
    return float(samples_inside.double().mean()), float(reference_inside.double().mean())


def _alone(name: str, count: int, work: Callable[[int], NDArray[Any]]) -> Iterator[NDArray[Any]]:
    del name
    return map(work, range(count))


def _radii(
    points: _Points, wanted: Tensor, k: int, screening: _Screening, report: Callable[[int], None]
) -> Tensor:
    """(wanted,) float64 squared distance of these points to their k-th nearest neighbour, as decided."""
    radii = []
    for rows in torch.split(wanted, _rows(len(points.x))):
        while True:
            level = screening.level
            view, error = screening.view(points, level), screening.screens[level].error
            shrunk = (1 - error) * view.norms
            scores = screening.scores(view.q[rows], view.q, shrunk)
            # Any k + 1 points bound the radius from above; the nearest in this view bound it well.
            near = scores.lowest(k + 1)
            bounds = _decide(points, rows.repeat_interleave(k + 1), points, near.flatten())
            bound = bounds.view(-1, k + 1).amax(dim=1)
            limit = _grown(
                bound,
                points.slack[rows] + points.slack.max(),
                view.displacement[rows] + view.displacement.max(),
            )
            # A radius of 0 cannot shrink: duplicates need not be compared with each other.
            limit = torch.where(bound > 0, limit - shrunk[rows], -torch.inf)
            i, j = scores.not_above(torch.arange(len(rows), device=rows.device), limit)
            if len(i) <= _affordable(scores, k) or level + 1 == len(screening.screens):
                break
            screening.level += 1
        distances = _decide(points, rows[i], points, j)
        bound[bound > 0] = _kth_smallest(i, distances, k)
        radii.append(bound)
        report(len(rows))
    return torch.cat(radii)


def _covered(
    points: _Points,
    wanted: Tensor,
    centres: _Points,
    radii: Tensor,
    centres_first: bool,
    screening: _Screening,
    report: Callable[[int], None],
) -> Tensor:
    """(wanted,) bool: whether each of these points lies in a ball around one of the centres.

    `centres_first` says which side the reference evaluator puts first, which matters in float16.
    """

    def inside(i: Tensor, j: Tensor) -> Tensor:
        distances = _decide(centres, j, points, i) if centres_first else _decide(points, i, centres, j)
        return distances <= radii[j]

    covered = []
    for rows in torch.split(wanted, _rows(len(centres.x))):
        while True:
            level = screening.level
            view, centre_view = (screening.view(side, level) for side in (points, centres))
            error = screening.screens[level].error
            reach = _grown(
                radii, centres.slack + points.slack.max(), centre_view.displacement + view.displacement.max()
            )
            scores = screening.scores(view.q[rows], centre_view.q, (1 - error) * centre_view.norms - reach)
            # Most points that are inside are inside the most promising ball.
            is_inside = inside(rows, scores.lowest(1).flatten())
            unclear = (~is_inside).nonzero().flatten()
            i, j = scores.not_above(unclear, (error - 1) * view.norms[rows[unclear]])
            if len(i) <= _affordable(scores, 1) or level + 1 == len(screening.screens):
                break
            screening.level += 1
        i = unclear[i]
        is_inside[i[inside(rows[i], j)]] = True
        covered.append(is_inside)
        report(len(rows))
    return torch.cat(covered)


@dataclass(frozen=True, eq=False)
class _Scores:
    """Scores of a block, with minima of groups of columns, so that few need to be looked at again.

    Attributes:
        groups: (rows, _GROUP, g); column c of the block is at ``[:, c // g, c % g]``.
        minima: (rows, g) of each group; NaN, from overflow, spreads.
    """

    groups: Tensor
    minima: Tensor

    def lowest(self, count: int) -> Tensor:
        """(rows, count) distinct columns with low scores, the lowest among them."""
        if count > self.minima.shape[1]:
            return self.groups.flatten(1).topk(count, largest=False).indices
        group = self.minima.topk(count, largest=False).indices
        members = self.groups.gather(2, group[:, None, :].expand(-1, _GROUP, -1))
        return members.argmin(dim=1) * self.minima.shape[1] + group

    def not_above(self, rows: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Index into `rows`, ascending, and column of the scores not above the row's limit; NaN is not."""
        limits = limits.to(self.minima.dtype)
        i, group = _nonzero(~(self.minima[rows] > limits[:, None]))
        member, offset = _nonzero(~(self.groups[rows[i], :, group] > limits[i, None]))
        return i[member], offset * self.minima.shape[1] + group[member]


def _nonzero(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the true entries; several times as fast as ``mask.nonzero()`` on a CPU."""
    flat = (
        torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.is_cpu else mask.flatten().nonzero().flatten()
    )
    return flat.div(mask.shape[1], rounding_mode="floor"), flat % mask.shape[1]


def _affordable(scores: _Scores, k: int) -> int:
    """How many pairs of a block may be decided one by one."""
    return max(int(_SURVIVORS * scores.groups.numel()), 8 * (k + 1) * len(scores.groups))


def _kth_smallest(i: Tensor, distances: Tensor, k: int) -> Tensor:
    """Entry k of the sorted distances of each group; `i`, ascending, names the groups."""
    order = distances.argsort(stable=True)
    order = order[i[order].argsort(stable=True)]
    _, counts = torch.unique_consecutive(i, return_counts=True)
    starts = counts.cumsum(0) - counts
    return distances[order[starts + k]]


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
