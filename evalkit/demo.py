"""Two small batches of real images: scikit-learn's handwritten digits, halved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import MissingDependencyError, OutputError
from evalkit.files import replace_atomically
from evalkit.sheet import write_sheet

__all__ = ["digits", "write_batches"]

IMAGES = 800
GRID = 16


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1,797 digits of UCI's optical recognition set, in a seeded random order.

    Returns:
        (1797, 8, 8, 3) uint8 in [0, 255], grey; (1797,) int64 labels, the digits.

    Raises:
        MissingDependencyError: scikit-learn, which ships them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError(
            "The demo's images come with scikit-learn, which is not installed: pip install 'evalkit[demo]'"
        ) from None
    data = load_digits()
    grey = np.round(data.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(grey))
    return np.repeat(grey[order, :, :, None], 3, axis=3), data.target[order].astype(np.int64)


def write_batches(folder: Path) -> tuple[Path, Path, Path]:
    """Write ``reference.npz`` and ``samples.npz``, 800 digits each with their labels, and ``samples.png``.

    Raises:
        OutputError: ``folder`` cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Cannot make the folder {folder}: {error.strerror}. Give another --out."
        ) from error
    images, labels = digits()
    paths = folder / "reference.npz", folder / "samples.npz", folder / "samples.png"
    for path, part in zip(paths[:2], (slice(0, IMAGES), slice(IMAGES, 2 * IMAGES)), strict=True):
        with replace_atomically(path) as partial, partial.open("wb") as file:
            np.savez(file, arr_0=images[part], arr_1=labels[part])
    write_sheet(paths[2], images[IMAGES : IMAGES + GRID * GRID])
    return paths
