"""What is done to images before a network sees them, as each tool does it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["resize_tf1"]


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize: ``align_corners=False``, no half-pixel centres, no antialiasing.

    Source position ``i * in / out`` in float32, neighbours ``floor`` and ``floor + 1`` (clamped), columns
    interpolated before rows, as TensorFlow's ``ResizeBilinear`` kernel does.

    Args:
        images: (n, h, w, c), floating point.
        size: Side of the square output, pixels.

    Returns:
        (n, size, size, c), same dtype.
    """
    n, height, width, channels = images.shape
    # As a matrix: gathering its columns is several times as fast as gathering runs of three numbers.
    rows = _interpolate(images.reshape(n * height, width * channels), size, channels)
    return _interpolate(rows.reshape(n, height, size * channels), size).reshape(n, size, size, channels)


def _interpolate(x: Tensor, size: int, lanes: int = 1) -> Tensor:
    """Resize axis 1 to `size` pixels of `lanes` numbers each."""
    extent = x.shape[1] // lanes
    if extent == size:
        return x
    position = np.arange(size, dtype=np.float32) * (np.float32(extent) / np.float32(size))
    lower = np.floor(position).astype(np.int64)
    near, far = (
        x.index_select(1, torch.from_numpy((index[:, None] * lanes + np.arange(lanes)).ravel()).to(x.device))
        for index in (lower, np.minimum(lower + 1, extent - 1))
    )
    weight = torch.from_numpy(np.repeat(position - lower.astype(np.float32), lanes)).to(x)
    return near.addcmul_(far.sub_(near), weight.reshape([-1] + [1] * (x.ndim - 2)))
