"""How the images of a batch spread over its classes: balanced, drawn at random, or neither."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from evalkit.batches import LabelBalance
from evalkit.images import are_ids

__all__ = ["are_far_from_uniform", "label_balance"]

LEAST_EXPECTED = 5
"""Images of a class from which on classes of nearly equal size can be told from random ones."""


def are_far_from_uniform(counts: NDArray[np.int64]) -> bool:
    """Whether classes differ more in size than if labels had been drawn uniformly.

    Counts are then about Poisson variables; none is six standard deviations off.

    Args:
        counts: (k,) images of each class.
    """
    expected = counts.mean()
    return len(counts) > 1 and bool(np.abs(counts - expected).max() > max(6 * np.sqrt(expected), 2))


def label_balance(labels: NDArray[np.int64] | None) -> LabelBalance:
    """How many images each class has, and whether that is as of balanced or of random labels.

    Args:
        labels: (n,); None where the batch has none.
    """
    if labels is None or not len(labels):
        return LabelBalance(kind="none")
    counts = np.unique(labels, return_counts=True)[1].astype(np.int64)
    found = {"classes": len(counts), "least": int(counts.min()), "most": int(counts.max())}
    if are_ids(labels):
        return LabelBalance(kind="ids", **found)
    if found["least"] == found["most"]:
        return LabelBalance(kind="balanced", **found)
    if are_far_from_uniform(counts) or _are_too_even(counts):
        return LabelBalance(kind="uneven", **found)
    return LabelBalance(kind="random", **found)


def _are_too_even(counts: NDArray[np.int64]) -> bool:
    """Whether classes differ less in size than drawn ones: their variance is far below the mean.

    The ratio has mean 1 and variance ``2 / (k - 1)`` for labels that were drawn uniformly.
    """
    expected = counts.mean()
    if expected < LEAST_EXPECTED:
        return False
    return bool(counts.var(ddof=1) / expected < 1 - 6 * math.sqrt(2 / (len(counts) - 1)))
