"""The CIFAR-10 images that the golden values are of."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["cifar10"]


def cifar10(folder: Path, split: str, count: int) -> NDArray[np.uint8]:
    """The first ``count`` images after the permutation of the golden values, (count, 32, 32, 3)."""
    with np.load(folder / "data" / "cifar10_jpeg.npz", allow_pickle=False) as data:
        indices = np.flatnonzero(data["is_test"] == (split == "test"))
        chosen = indices[np.random.RandomState(0).permutation(len(indices))[:count]]
        jpeg, offsets = data["jpeg"], data["offsets"]
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()))) for i in chosen]
    )
