"""Checks scores of halves against those that a function gives for each half."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from evalkit.deviations import HalfSplit
from evalkit.metrics import halves
from evalkit.metrics.halves import REPLICATES


def in_second(
    n: int, seed: int, share: float = 1.0, classes: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Drawn rows, and (drawn, replicates) whether each is in the second half."""
    made = halves._Halves.of(n, share, classes, seed)
    return made.drawn, np.unpackbits(made.second.view(np.uint8), axis=1).astype(bool)


def check_halves(
    found: Sequence[HalfSplit],
    scores: Callable[[NDArray[np.float32], NDArray[np.float32]], Sequence[float]],
    r: NDArray[np.float32],
    s: NDArray[np.float32],
    replicates: Iterable[int],
    share: float = 1.0,
) -> None:
    """In these replicates, ``found`` has the differences of ``scores(half of r, half of s)``."""
    (of_r, r_second), (of_s, s_second) = in_second(len(r), 1, share), in_second(len(s), 2, share)
    for b in replicates:
        of_halves = np.array(
            [
                [scores(r[of_r][r_second[:, b] == j], s[of_s][s_second[:, b] == i]) for j in (0, 1)]
                for i in (0, 1)
            ]
        )
        for score, each in enumerate(found):
            t = np.sqrt(share) * of_halves[:, :, score]
            pairs = [b, b + REPLICATES]
            np.testing.assert_allclose(each.samples[pairs], t[0] - t[1], atol=1e-12)
            np.testing.assert_allclose(each.reference[pairs], t[:, 0] - t[:, 1], atol=1e-12)
            np.testing.assert_allclose(each.both[pairs], [t[0, 0] - t[1, 1], t[0, 1] - t[1, 0]], atol=1e-12)
