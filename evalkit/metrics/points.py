"""Points whose distances are compared, and the arithmetic that decides pairs one by one."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.system.devices import float64_device

__all__ = [
    "BLOCK_ENTRIES",
    "Exact",
    "Points",
    "block_rows",
    "by_lot",
    "centred_sides",
    "decide",
    "exact_sides",
    "on_device",
]

BLOCK_ENTRIES = 2**22
"""Numbers in a block of features that are converted at a time."""

# Numbers in the features of the pairs that are decided at a time on a CPU; torch uses threads from 2^15 on.
CPU_ENTRIES = 2**15 - 1


class Points(Protocol):
    """The points of one side, with the arithmetic that decides their distances.

    Attributes:
        x: (n, d) points that are exactly representable in float32.
        slack: (n,) float64; a decided distance of at most t means ``|x_i - x_j|^2 <= t (1 + 2^-9) +
            slack_i + slack_j``.
    """

    x: Tensor
    slack: Tensor

    def distances(self, i: Tensor, other: Points, j: Tensor) -> Tensor:
        """(pairs,) float64 squared distances of points ``i`` to points ``j`` of ``other``, in this order."""


class Exact:
    """Points whose squared distances are computed in float64."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.slack = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def distances(self, i: Tensor, other: Points, j: Tensor) -> Tensor:
        """(pairs,) float64; see :class:`Points`."""
        difference = self.x.index_select(0, i).double()
        difference -= other.x.index_select(0, j)
        return difference.square_().sum(dim=1)


def on_device(device: str, *sides: NDArray[np.floating]) -> list[Tensor]:
    """The rows of each side in float32, on a device with float64: the CPU in place of ``mps``."""
    target = float64_device(device)
    return [torch.from_numpy(np.ascontiguousarray(side, np.float32)).to(target) for side in sides]


def exact_sides(r: Tensor, s: Tensor) -> tuple[Exact, Exact]:
    """Both sides, scaled by one power of two so that float32 squares neither overflow nor vanish.

    Args:
        r: (m, d) float32.
        s: (n, d) float32, on the same device.
    """
    largest = max(float(x.abs().max()) for x in (r, s))
    if largest == 0 or 2.0**-20 < largest < 2.0**40:
        return Exact(r), Exact(s)
    scale = 2.0 ** -max(-126, min(126, math.frexp(largest)[1]))
    return Exact(r * scale), Exact(s * scale)


def centred_sides(
    r: NDArray[np.float32], s: NDArray[np.float32], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Both in float32, around the reference's mean, and below 1: no square overflows, and less cancels.

    The scale is a power of 2, which leaves ties what they are.

    Args:
        r: (m, d) float32.
        s: (n, d) float32.
        device: Where they go.
    """
    centre = r.mean(axis=0, dtype=np.float64).astype(np.float32)
    a, b = (torch.from_numpy(each - centre).to(device) for each in (r, s))
    exponent = math.frexp(max(float(a.abs().max()), float(b.abs().max())))[1]
    scale = 2.0 ** -max(-126, min(126, exponent))
    return a * scale, b * scale


def decide(a: Points, i: Tensor, b: Points, j: Tensor) -> Tensor:
    """(pairs,) float64 squared distances of points ``i`` of ``a`` to points ``j`` of ``b``."""
    # Small chunks fit the cache, and torch computes them in one thread: waking threads for every chunk costs
    # more than the work, and much more while other processes use the cores.
    entries = CPU_ENTRIES if i.is_cpu else BLOCK_ENTRIES
    size = max(1, entries // a.x.shape[1])
    distances = torch.empty(len(i), dtype=torch.float64, device=i.device)
    for start in range(0, len(i), size):
        chunk = slice(start, start + size)
        distances[chunk] = a.distances(i[chunk], b, j[chunk])
    return distances


def block_rows(columns: int) -> int:
    """Number of rows in a block of so many columns."""
    return max(256, min(1024, BLOCK_ENTRIES // columns))


def by_lot(rows: NDArray[np.floating]) -> NDArray[np.int64]:
    """Indices of the rows in a random order, whatever order they come in: a digest of each is its lot.

    Copies of a row have lots of their own. With the same, they would be drawn together.
    """
    seen: dict[bytes, int] = {}
    digests = []
    for row in rows:
        content = row.tobytes()
        lot = hashlib.blake2b(content, digest_size=8).digest()
        copies = seen[lot] = seen.get(lot, 0) + 1
        if copies > 1:
            lot = hashlib.blake2b(content + copies.to_bytes(8, "little"), digest_size=8).digest()
        digests.append(lot)
    return np.argsort(np.array(digests), kind="stable").astype(np.int64)
