"""Screens: cheap products in few bits that bound all squared distances from below.

The margins are worst-case bounds of the rounding. So deciding a pair that a screen rules out could not give
another result.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evalkit.metrics.points import Points, block_rows

__all__ = ["CPU_TILE", "GPU_TILE", "Screen", "Screening", "fast_dtype"]

CPU_TILE = (1024, 2048)
"""Rows and columns of a product that is examined at a time; on a CPU it stays in the caches."""

GPU_TILE = (4096, 8192)
"""The same for other devices."""

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
"""Integer types by float type: the bits of non-negative floats, read as integers, are in the same order."""

# Columns of a view besides those of the points.
_NORM_PARTS = 3
_ALIGNMENT = 32


@dataclass(frozen=True, eq=False)
class Screen:
    """A cheap way to compute all distances, and a bound of its error.

    Attributes:
        centre: (d,) float32, subtracted from all points against cancellation.
        dtype: Of the points and of the distances; products are accumulated in float32 or float64.
    """

    centre: Tensor
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """The dtype of centred points and of accumulated products."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def error(self) -> float:
        """Bound of the error of an accumulated ``|p|^2 + |q|^2 - 2pq``, relative to ``|p|^2 + |q|^2``.

        It includes the rounding of the norms to a sum of three numbers of ``dtype``.
        """
        return (len(self.centre) + 2 * _NORM_PARTS + 16) * torch.finfo(self.wide).eps

    def view(self, points: Points) -> _View:
        """The points as this screen needs them for its products."""
        n, d = points.x.shape
        epsilon = torch.finfo(self.wide).eps
        width = d + 2 * _NORM_PARTS
        right = torch.zeros(n, width + -width % _ALIGNMENT, dtype=self.dtype, device=points.x.device)
        displacement = torch.empty(n, dtype=torch.float64, device=right.device)
        for rows in torch.split(torch.arange(n, device=right.device), block_rows(d)):
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
    """Points prepared for a screen, so that one product gives squared distances that are never too large.

    Attributes:
        right: (n, w) in the screen's dtype: the centred points q, slightly less than their squared norms in
            three parts, and as many ones; then zeros.
        d: Number of columns of q.
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


def _screens(reference: Points) -> list[Screen]:
    """The screens to use, from the fastest to the finest."""
    # The median, because one outlier would pull the mean away from all other points.
    x = reference.x
    centre = x[:: max(1, len(x) // 1024)].float().median(dim=0).values
    dtypes = dict.fromkeys([fast_dtype(centre.device), torch.float32, torch.float64])
    return [Screen(centre, dtype) for dtype in dtypes]


@functools.cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the first screen: bfloat16 if this processor multiplies it faster, as with AMX."""
    if device.type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype, device=device)
        a @ a.T
        start = time.perf_counter()
        for _ in range(3):
            a @ a.T
        seconds[dtype] = time.perf_counter() - start
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


def _grown(t: Tensor, slack: Tensor | float, displacement: Tensor | float) -> Tensor:
    """The largest squared distance that a screen can give to a pair whose decided distance is at most ``t``.

    The last two terms cover the rounding to float32, and products that underflow.
    """
    root = (t * (1 + 2**-9) + slack).clamp(min=0).sqrt() + displacement
    return root.square() * (1 + 2**-20) + 2**-100


class Screening:
    """The screens of one comparison and the views of its two sides, each made when it is first needed.

    Args:
        reference: Its points choose the centre.
        screens: From the fastest to the finest; None chooses by device.
    """

    def __init__(self, reference: Points, screens: Sequence[Screen] | None = None) -> None:
        self._screens = screens or _screens(reference)
        self._level = 0
        self._views: dict[tuple[int, int], _View] = {}
        self._left: tuple[tuple[int, int, int], Tensor] | None = None
        self._buffers: dict[torch.dtype, Tensor] = {}
        device = self._screens[0].centre.device
        self.tile = CPU_TILE if device.type == "cpu" else GPU_TILE

    def begin(self) -> None:
        """Go back to the fastest screen."""
        self._level = 0

    def refine(self) -> bool:
        """Advance to the next finer screen; False if there is none."""
        finer = self._level + 1 < len(self._screens)
        self._level += finer
        return finer

    def seen(self, a: Points, rows: slice, b: Points, columns: slice) -> Tensor:
        """(rows, columns) squared distances by the current screen; valid until the next call.

        The bits of the floats as integers, which are in the same order and faster to compare.
        """
        key = (id(a), rows.start, self._level)
        if self._left is None or self._left[0] != key:
            self._left = key, self._view(a).left(rows)
        left, right = self._left[1], self._view(b).right[columns]
        seen = torch.mm(left, right.T, out=self._buffer(len(left), len(right), left.dtype))
        return seen.view(_BITS[seen.dtype])

    def limits(self, t: Tensor, a: Points, rows: slice, b: Points) -> Tensor:
        """(rows,) the largest value of :meth:`seen` for a pair whose decided distance is at most ``t``.

        For points of ``a`` and any of ``b``. Where ``t`` is negative, no value is that small.
        """
        displacement = self._view(a).displacement[rows] + self._view(b).displacement.max()
        limits = _grown(t.clamp(min=0), a.slack[rows] + b.slack.max(), displacement)
        dtype = self._screens[self._level].dtype
        limits = limits * (1 + torch.finfo(dtype).eps / 2)  # seen() rounds to nearest
        rounded = limits.to(dtype)
        bits = rounded.view(_BITS[dtype])
        bits = bits + (rounded.double() < limits)  # round up
        return torch.where(t < 0, torch.iinfo(bits.dtype).min, bits)

    def near_enough(self, seen: Tensor, t: Tensor, a: Points, i: Tensor, b: Points, j: Tensor) -> Tensor:
        """(pairs,) bool: whether pairs with these values of :meth:`seen` can be decided as at most ``t``.

        More precise than :meth:`limits`, which knows only one of the two points and assumes the worst of the
        other.
        """
        slack, displacement = a.slack[i] + b.slack[j], self._view(a).displacement[i]
        limits = _grown(t, slack, displacement + self._view(b).displacement[j])
        epsilon = torch.finfo(self._screens[self._level].dtype).eps
        return self.values(seen).double() <= limits * (1 + epsilon)

    def values(self, seen: Tensor) -> Tensor:
        """Results of :meth:`seen` or :meth:`limits` as float32."""
        return seen.view(self._screens[self._level].dtype).float()

    def _view(self, points: Points) -> _View:
        key = (id(points), self._level)
        if key not in self._views:
            self._views[key] = self._screens[self._level].view(points)
        return self._views[key]

    def _buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory that is reused: new pages would cost more than the arithmetic."""
        if dtype not in self._buffers:
            entries = math.prod(self.tile)
            self._buffers[dtype] = torch.empty(entries, dtype=dtype, device=self._screens[0].centre.device)
        return self._buffers[dtype][: rows * columns].view(rows, columns)
