"""Labels: is an array one class for each image, and are its numbers classes or ids?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["are_ids", "labels_problem"]


def are_ids(labels: NDArray[np.int64]) -> bool:
    """Whether labels are seeds or ids rather than classes: few different numbers over a vast range.

    The range, from 0 or the smallest label to the largest, is vast if it is over 100,000 and over 1,000
    times the number of different labels.

    Args:
        labels: (n,).
    """
    if not len(labels):
        return False
    # Python's integers: the range may be larger than 64 bits hold.
    span = int(labels.max()) - min(int(labels.min()), 0)
    return span > max(100_000, 1000 * len(np.unique(labels)))


def labels_problem(count: int, key: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> str | None:
    """Why an array of this shape and type is not one class for each of ``count`` images; None if it is."""
    if shape == (count,) and dtype.kind in "ui":
        return None
    text = f"expected {count} integers, found {dtype} {shape} in {key}"
    if len(shape) == 2 and shape[0] == count:
        if shape[1] == 1:
            return f"{text}, a column; make it a row with labels.reshape(-1)"
        return f"{text}, one-hot it seems; turn it into classes with labels.argmax(axis=1)"
    if shape == (count,) and dtype.kind == "f":
        return f"{text}; turn it into classes with labels.astype(int)"
    return text
