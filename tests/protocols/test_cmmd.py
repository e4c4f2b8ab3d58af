"""CMMD's formula written out, on the same embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from stand_ins import NO_STORE, stand_in

from evalkit.comparison import compare


def mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """``mmd`` of google-research's ``cmmd/distance.py``, of embeddings of length 1."""
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    gamma = 1 / (2 * 10**2)

    def mean(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        squares = np.diag(a @ a.T)[:, None] + np.diag(b @ b.T)[None] - 2 * a @ b.T
        return float(np.exp(-gamma * squares).mean())

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_its_number(images: NDArray[np.uint8]) -> None:
    extractor = stand_in("clip_vitl14_336")
    sides = images[::2], images[1::2] // 2
    found = compare(*sides, protocol="cmmd", extractor=extractor, run=NO_STORE)
    x, y = (extractor(side)["embedding"].astype(np.float64) for side in sides)
    assert [score.name for score in found.scores] == ["cmmd"]
    assert found["cmmd"] == pytest.approx(mmd(x, y), rel=1e-6)
    assert found["cmmd"] > 1e-4
