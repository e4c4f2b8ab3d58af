"""Points of all kinds for what compares distances, and these distances by their definition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

N = 600  # enough that no two screens see the same


def exact_distances(u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, m) squared."""
    return np.stack([np.square(row.astype(np.float64) - v).sum(axis=1) for row in u])


def clouds() -> dict[str, tuple[NDArray[np.generic], NDArray[np.generic]]]:
    """Pairs of sides."""
    rng = np.random.default_rng(0)
    normal = rng.normal
    spectrum = np.exp(-np.arange(320) / 60)
    x, y = normal(size=(N, 256)), normal(size=(N + 37, 256))
    few = rng.integers(0, 5, N)
    outlier = x.copy()
    outlier[0] *= 1e12
    return {
        "decaying spectrum": (normal(size=(N, 320)) * spectrum, normal(size=(N + 5, 320)) * spectrum + 0.02),
        "isotropic": (x, y),
        "few dimensions": (x[:, :3], y[:, :3]),
        "one dimension": (x[:, :1], y[:, :1]),
        "non-negative, as pool features are": (np.abs(x), np.abs(y)),
        "lattice, full of ties": (rng.integers(0, 3, (N, 6)), rng.integers(0, 3, (N, 6))),
        "lattice in a wide space": (rng.integers(0, 2, (N, 256)), rng.integers(0, 2, (N, 256))),
        "constant": (np.ones((N, 256)), np.ones((N, 256))),
        "two constants": (np.ones((N, 256)), np.full((N, 256), 1.001)),
        "all zero": (np.zeros((N, 256)), np.zeros((N, 256))),
        "the same set": (x, x),
        "duplicates": (x[rng.integers(0, 50, N)], x[rng.integers(0, 100, N)]),
        "near duplicates": (x[few] + 1e-5 * normal(size=x.shape), x[few] + 1e-5 * normal(size=x.shape)),
        "common offset": (x + 1000, y + 1000),
        "small common offset": (x + 5, y + 5),
        "one side far away": (x, y + 1e5),
        "outlier": (outlier, y),
        "near the float16 limit": (x * 7, y * 7),
        "float16 overflow": (x * 20, y * 20),
        "float32 squares overflow": (x * 1e30, y * 1e30),
        "float32 squares vanish": (x * 1e-25, y * 1e-25),
        "fewer than 16 points": (x[:4], y[:9]),
    }


CLOUDS = {name: tuple(np.asarray(side, np.float32) for side in pair) for name, pair in clouds().items()}
