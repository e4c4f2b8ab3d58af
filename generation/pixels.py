"""Between 8-bit images and the tensors in [-1, 1] that networks read and predict."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["from_uint8", "to_uint8"]


def from_uint8(images: NDArray[np.uint8]) -> Tensor:
    """``(b, h, w, 3)`` in [0, 255] to ``(b, 3, h, w)`` float32 in [-1, 1]."""
    return torch.from_numpy(images).float().permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def to_uint8(x: Tensor) -> NDArray[np.uint8]:
    """``(b, c, h, w)`` in [-1, 1] to ``(b, h, w, c)`` uint8, clipped and truncated as by the reference."""
    pixels = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    array: NDArray[np.uint8] = pixels.contiguous().cpu().numpy()
    return array
