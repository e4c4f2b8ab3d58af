"""Precision, recall, density, coverage and AuthPct of many halves at once, for their standard errors.

They have no useful influence values: a ball's radius jumps from neighbour to neighbour. So both sides are
halved at random, many times, and complementary halves compared (see :class:`~evalkit.deviations.HalfSplit`).
Neighbours are searched once. A ball of a half reaches to the k-th of its centre's neighbours that are in the
same half, so a list of more neighbours than k has the radii of all halves. Which half an image is in is one
bit a replicate, and words of 64 bits hold 64 replicates: the halves together cost less than the search.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from evalkit.deviations import HalfSplit
from evalkit.errors import UndefinedMetricError
from evalkit.metrics.points import centred_sides
from evalkit.system.devices import float32_arithmetic

__all__ = [
    "MOST_IMAGES",
    "halves_bytes",
    "halves_of_authenticity",
    "halves_of_density_coverage",
    "halves_of_precision_recall",
    "scores_of_halves",
]

Words = NDArray[np.uint64]
Labels = NDArray[np.int64]

MOST_IMAGES = 10_000
"""Images of a side that are halved. Of larger sides, this share of both is drawn: variance falls with 1/n."""

REPLICATES = 512
"""Random halvings: they add 4 % to the uncertainty of a standard error."""

_TOO_SHORT = 1e-9
"""Chance that a list of neighbours does not reach to the k-th in a half; if it happens, lists are doubled."""

# Images among which the nearest of a half is found. The chance that all are in the other half is 2^-64.
_LONGEST = 64

_ROWS = 1024
_PAIRS = 2**16


def halves_of_precision_recall(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    *,
    k: int = 3,
    classes: Labels | None = None,
    reference_classes: Labels | None = None,
    device: torch.device | None = None,
) -> tuple[HalfSplit, HalfSplit]:
    """How precision and recall (see :func:`~evalkit.metrics.precision_recall.precision_recall`) deviate.

    Distances are computed in float32: a standard error does not depend on their last bits. Sets of the same
    size and classes have the same halves, so that two of them can be paired.

    Args:
        reference: (n, d) float32 features.
        samples: (m, d) float32 features.
        k: The radius of a ball reaches to this nearest neighbour.
        classes: (m,) class of each sample where these are balanced: then halves are drawn within classes.
        reference_classes: (n,) likewise.
        device: torch device of the distances.

    Raises:
        UndefinedMetricError: Half of a side has no more than k images.
    """
    sides = _Sides.of(reference, samples, k, classes, reference_classes, device)
    precision, recall = _precision_recall(sides, k)
    return (
        _half_split(precision, sides.samples.name, len(samples), "the bias of precision is not known"),
        _half_split(recall, sides.samples.name, len(samples), "the bias of recall is not known"),
    )


def scores_of_halves(
    reference: NDArray[np.float32], samples: NDArray[np.float32], *, k: int, device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(2, 2, replicates) precision and recall: by half of the samples, by half of the reference."""
    return _precision_recall(_Sides.of(reference, samples, k, None, None, device), k)


def _precision_recall(sides: _Sides, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r, s = sides.reference, sides.samples
    covered_r, covered_s = _Covered.none(r.second), _Covered.none(s.second)
    with torch.inference_mode(), float32_arithmetic():
        balls_r, balls_s = _Balls.of(sides.x, r.second, k), _Balls.of(sides.y, s.second, k)
        for rows, distances in _distances(sides.y, sides.x):
            for point, centre, inside in _inside(balls_r, rows, slice(None), distances):
                covered_s.mark(point, inside, r.second[centre])
            for point, centre, inside in _inside(balls_s, slice(None), rows, distances.T):
                covered_r.mark(point, inside, s.second[centre])
    scale = np.sqrt(sides.share)
    return scale * covered_s.shares(s.second), scale * covered_r.shares(r.second).swapaxes(0, 1)


def halves_of_density_coverage(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    *,
    k: int = 5,
    classes: Labels | None = None,
    reference_classes: Labels | None = None,
    device: torch.device | None = None,
) -> tuple[HalfSplit, HalfSplit]:
    """How density and coverage deviate; arguments and errors as in :func:`halves_of_precision_recall`."""
    sides = _Sides.of(reference, samples, k, classes, reference_classes, device)
    r, s = sides.reference, sides.samples
    covered = _Covered.none(r.second)
    pairs = np.zeros((2, 2, REPLICATES), np.int64)
    with torch.inference_mode(), float32_arithmetic():
        balls = _Balls.of(sides.x, r.second, k)
        for rows, distances in _distances(sides.y, sides.x):
            for point, centre, inside in _inside(balls, rows, slice(None), distances, strictly=True):
                of_point, of_centre = s.second[point], r.second[centre]
                covered.mark(centre, inside, of_point)
                for i, own in enumerate((inside & ~of_point, inside & of_point)):
                    pairs[i] += _counts(own & ~of_centre), _counts(own & of_centre)
    sizes = np.stack([_counts(~s.second), _counts(s.second)])
    scale = np.sqrt(sides.share)
    density, coverage = scale * pairs / (k * sizes[:, None]), scale * covered.shares(r.second)
    return (
        _half_split(density, s.name, len(samples), "the bias of density is not known"),
        _half_split(coverage.swapaxes(0, 1), s.name, len(samples), "the bias of coverage is not known"),
    )


def halves_of_authenticity(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    *,
    classes: Labels | None = None,
    reference_classes: Labels | None = None,
    device: torch.device | None = None,
) -> HalfSplit:
    """How AuthPct deviates; arguments and errors as in :func:`halves_of_precision_recall`."""
    sides = _Sides.of(reference, samples, 1, classes, reference_classes, device)
    r, s = sides.reference, sides.samples
    copies = np.zeros((2, 2, REPLICATES), np.int64)
    with torch.inference_mode(), float32_arithmetic():
        balls = _Balls.of(sides.x, r.second, 1)
        for rows, distances in _distances(sides.y, sides.x):
            near, images = distances.topk(min(_LONGEST, len(r.drawn)), dim=1, largest=False)
            of_halves = _copies(balls, near.cpu().numpy(), images.cpu().numpy())
            for i, own in enumerate((~s.second[rows], s.second[rows])):
                copies[i] += [_counts(own & each) for each in of_halves]
    sizes = np.stack([_counts(~s.second), _counts(s.second)])
    authentic = np.sqrt(sides.share) * 100 * (1 - copies / sizes[:, None])
    return _half_split(authentic, s.name, len(samples), "the bias of AuthPct is not known")


def _copies(balls: _Balls, near: NDArray[np.float32], images: NDArray[np.int64]) -> Words:
    """(2, points, w) replicates in which a point's nearest image in a half has no other nearer to it there.

    Args:
        balls: Of the images, with k = 1.
        near: (points, c) squared distances to the nearest images of both halves, ascending.
        images: (points, c) which they are.
    """
    left = np.full((2, len(near), balls.second.shape[1]), ~np.uint64(0))
    copies = np.zeros_like(left)
    for distance, image in zip(near.T, images.T, strict=True):
        alone = balls.few[image, (balls.nearest[image] < distance[:, None]).sum(axis=1)]
        half = np.stack([~balls.second[image], balls.second[image]])
        copies |= left & half & alone
        left &= ~half
    return copies


def halves_bytes(images: Sequence[int], width: int) -> int:
    """Memory of the halves beyond the rows: float32 copies of the images that are halved."""
    return 12 * width * sum(min(n, MOST_IMAGES) for n in images)


@dataclass(frozen=True, eq=False)
class _Sides:
    """Both sides, ready to be halved.

    Attributes:
        reference: How the reference is halved; ``samples`` likewise.
        share: Of the images of both, those that are halved.
        x: (m, d) scaled features of the reference; ``y``, (n, d), of the samples.
    """

    reference: _Halves
    samples: _Halves
    share: float
    x: Tensor
    y: Tensor

    @classmethod
    def of(
        cls,
        reference: NDArray[np.float32],
        samples: NDArray[np.float32],
        k: int,
        classes: Labels | None,
        reference_classes: Labels | None,
        device: torch.device | None,
    ) -> _Sides:
        share = min(1.0, MOST_IMAGES / max(len(reference), len(samples)))
        r = _Halves.of(len(reference), share, reference_classes, seed=1)
        s = _Halves.of(len(samples), share, classes, seed=2)
        for name, side in (("reference", r), ("samples", s)):
            if len(side.drawn) < 2 * (k + 1):
                raise UndefinedMetricError(
                    f"halves of {len(side.drawn)} images ({name}) are too few for {k} neighbours; give at "
                    f"least {2 * (k + 1)}"
                )
        x, y = centred_sides(reference[r.drawn], samples[s.drawn], device or torch.device("cpu"))
        return cls(r, s, share, x, y)


def _half_split(shares: NDArray[np.float64], halves: str, images: int, no_bias: str) -> HalfSplit:
    """Of (2, 2, replicates) scores: halves of the samples, of the reference, replicates."""
    return HalfSplit(
        images=images,
        samples=np.concatenate(shares[0] - shares[1]),
        reference=np.concatenate(shares[:, 0] - shares[:, 1]),
        both=np.concatenate([shares[0, 0] - shares[1, 1], shares[0, 1] - shares[1, 0]]),
        no_bias=no_bias,
        halves=halves,
    )


@dataclass(frozen=True, eq=False)
class _Halves:
    """How a side is halved.

    Attributes:
        drawn: (m,) indices of the images that are halved.
        second: (m, w) the replicates, one bit each, in which an image is in the second half.
        name: The same for sides that are halved alike.
    """

    drawn: NDArray[np.int64]
    second: Words
    name: str

    @classmethod
    def of(cls, n: int, share: float, classes: Labels | None, seed: int) -> _Halves:
        rng = np.random.default_rng(seed)
        drawn = np.arange(n) if share == 1 else np.sort(rng.permutation(n)[: round(share * n)])
        group = np.zeros(len(drawn), np.int64) if classes is None else classes[drawn]
        bits = np.empty((len(drawn), REPLICATES), np.uint8)
        # Alternately, so that classes of odd sizes still give halves of the same size.
        alternating = np.arange(len(drawn), dtype=np.uint8) % 2
        bits[np.argsort(group, kind="stable")] = alternating[:, None]
        for each in np.unique(group):
            bits[group == each] = rng.permuted(bits[group == each], axis=0)
        digest = "" if classes is None else hashlib.sha256(classes.tobytes()).hexdigest()[:16]
        name = f"{len(drawn)} of {n} images {digest}".strip()
        return cls(drawn, np.packbits(bits, axis=1).view(np.uint64), name)


@dataclass(frozen=True, eq=False)
class _Balls:
    """The balls around the points of a side, in the whole side and in all halves of it.

    Attributes:
        nearest: (m, c) squared distances to the nearest other points, ascending.
        few: (m, c + 1, w) the replicates in which fewer than k of the first j neighbours are in the point's
            half.
        second: (m, w) the replicates in which the point is in the second half.
    """

    nearest: NDArray[np.float32]
    few: Words
    second: Words

    @classmethod
    def of(cls, x: Tensor, second: Words, k: int) -> _Balls:
        m, count = len(x), k
        while special.bdtr(k - 1, count, 0.5) > _TOO_SHORT:
            count += 1
        while True:
            count = min(count, m - 1)
            nearest, neighbours = _nearest(x, count)
            few = _few(second, neighbours, k)
            if count == m - 1 or not few[:, -1].any():
                return cls(nearest, few, second)
            count *= 2


@dataclass(frozen=True, eq=False)
class _Covered:
    """Which points are covered by a half of the other side.

    Attributes:
        by_first: (m, w) replicates in which the first half covers the point.
        by_second: (m, w) likewise.
    """

    by_first: Words
    by_second: Words

    @classmethod
    def none(cls, second: Words) -> _Covered:
        return cls(np.zeros_like(second), np.zeros_like(second))

    def mark(self, point: NDArray[np.int64], inside: Words, second: Words) -> None:
        """Add pairs of a point and what covers it.

        Args:
            point: (pairs,) indices of points.
            inside: (pairs, w) replicates in which the point is covered.
            second: (pairs, w) replicates in which what covers it is in the second half.
        """
        order = np.argsort(point, kind="stable")
        points, starts = np.unique(point[order], return_index=True)
        for covered, found in ((self.by_first, inside & ~second), (self.by_second, inside & second)):
            covered[points] |= np.bitwise_or.reduceat(found[order], starts, axis=0)

    def shares(self, second: Words) -> NDArray[np.float64]:
        """(2, 2, replicates) the share of each half of the points that each half of the other side covers."""
        found = np.empty((2, 2, REPLICATES))
        for half, points in enumerate((~second, second)):
            size = _counts(points)
            for other, covered in enumerate((self.by_first, self.by_second)):
                found[half, other] = _counts(covered & points) / size
        return found


def _inside(
    balls: _Balls, points: slice, centres: slice, distances: Tensor, *, strictly: bool = False
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Words]]:
    """Indices of points, of centres, and the replicates in which the ball of the centre's half has the point.

    Args:
        balls: Of the centres.
        points: A range of points.
        centres: A range of centres.
        distances: (points, centres) squared distances.
        strictly: Points on the sphere are outside.
    """
    reach = torch.from_numpy(balls.nearest[centres, -1]).to(distances.device)
    point, centre = ((distances <= reach).nonzero()).T
    near = distances[point, centre].cpu().numpy()
    first_point, first_centre = (each.start or 0 for each in (points, centres))
    point_of, centre_of = point.cpu().numpy() + first_point, centre.cpu().numpy() + first_centre
    for start in range(0, len(near), _PAIRS):
        pairs = slice(start, start + _PAIRS)
        nearest, distance = balls.nearest[centre_of[pairs]], near[pairs, None]
        # A ball reaches up to the k-th neighbour of its half: fewer than k are nearer, or strictly, as near.
        nearer = (nearest <= distance) if strictly else (nearest < distance)
        yield point_of[pairs], centre_of[pairs], balls.few[centre_of[pairs], nearer.sum(axis=1)]


def _counts(words: Words) -> NDArray[np.int64]:
    """(replicates,) number of points whose bit is set."""
    found: NDArray[np.int64] = np.unpackbits(words.view(np.uint8), axis=1).sum(axis=0, dtype=np.int64)
    return found


def _few(second: Words, neighbours: NDArray[np.int64], k: int) -> Words:
    """(m, c + 1, w) replicates in which fewer than k of the first j of c neighbours are in the same half."""
    m, count = neighbours.shape
    few = np.empty((m, count + 1, second.shape[1]), np.uint64)
    # Entry t: at least t + 1 neighbours were in the same half.
    at_least = np.zeros((k, *second.shape), np.uint64)
    for j in range(count):
        few[:, j] = ~at_least[-1]
        same = ~(second ^ second[neighbours[:, j]])
        for t in range(k - 1, 0, -1):
            at_least[t] |= at_least[t - 1] & same
        at_least[0] |= same
    few[:, count] = ~at_least[-1]
    return few


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``a``, and their squared distances to all of ``b``."""
    norms_a, norms_b = (each.square().sum(dim=1) for each in (a, b))
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        products = torch.addmm(norms_b, a[rows], b.T, alpha=-2)
        yield rows, products.add_(norms_a[rows, None]).clamp_(min=0)


def _nearest(x: Tensor, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(m, count) squared distances to the nearest other points, ascending, and which they are."""
    distances, neighbours = [], []
    for rows, block in _distances(x, x):
        block.diagonal(rows.start).fill_(torch.inf)
        found = block.topk(count, dim=1, largest=False)
        distances.append(found.values.cpu().numpy())
        neighbours.append(found.indices.cpu().numpy())
    return np.concatenate(distances), np.concatenate(neighbours)
