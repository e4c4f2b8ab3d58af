"""An extractor without weights: pixels on a coarse grid. For tests, of this package and of its users'."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pixels"]


class Pixels:
    """Features that are pixels: instant, and different for different images. No published number uses them.

    Args:
        variant: Part of the fingerprint, to make features that must not be mixed with others.
    """

    name: ClassVar[str] = "pixels"
    batch_size: ClassVar[int] = 64
    dimensions: ClassVar[Mapping[str, int]] = {"pool": 48, "spatial": 12}

    def __init__(self, variant: str = ""):
        self.variant = variant

    @property
    def fingerprint(self) -> str:
        """Digest of the name and the variant."""
        return hashlib.sha256(f"pixels 1 {self.variant}".encode()).hexdigest()

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """``(n, h, w, 3)`` to ``pool`` (n, 48), a 4x4 grid, and ``spatial`` (n, 12), 2x2; in [0, 1]."""
        return {"pool": self._grid(images, 4), "spatial": self._grid(images, 2)}

    @staticmethod
    def _grid(images: NDArray[Any], side: int) -> NDArray[np.float32]:
        rows, columns = (np.arange(side) * extent // side for extent in images.shape[1:3])
        return (images[:, rows][:, :, columns].reshape(len(images), -1) / 255).astype(np.float32)

    def logits(self, pool: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first 10 features as class scores."""
        return pool[:, :10] * 4
