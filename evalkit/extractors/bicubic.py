"""The bicubic resizes before DINOv2 and CLIP, as each tool does them; all of them antialias.

Pillow resizes bytes and rounds to bytes after each pass, torch resizes floats and rounds nothing: the same
image comes out up to several grey levels apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = [
    "CLIP",
    "IMAGENET",
    "crop_and_resize",
    "resize_and_crop",
    "scaled",
    "squash",
    "squash_as_floats",
]

Bytes = NDArray[np.uint8]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels in [0, 1], by channel."""

CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""The same of CLIP's training images (``clip/clip.py`` of openai/CLIP)."""


def scaled(images: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """``(x / 255 - mean) / std``, in float32 and in this order, as all of these tools round it.

    Args:
        images: (n, 3, h, w), float32, values in [0, 255].
        statistics: Mean and standard deviation of each channel, of pixels in [0, 1].
    """
    mean, std = (torch.tensor(values).to(images.device)[:, None, None] for values in statistics)
    return (images / 255).sub_(mean).div_(std)


def squash_as_floats(images: Tensor, size: int) -> Tensor:
    """The resize of torch to a square, whatever the shape was; results may lie outside [0, 255].

    As EDM2's ``calculate_metrics.py`` does before DINOv2.

    Args:
        images: (n, h, w, 3), values in [0, 255].
        size: Side of the square output, pixels.

    Returns:
        (n, 3, size, size), float32.
    """
    # Not channels-last, for which torch on a CPU may round in another order.
    planes = images.permute(0, 3, 1, 2).float().contiguous()
    return F.interpolate(planes, (size, size), mode="bicubic", antialias=True)


def squash(images: NDArray[Any], size: int) -> Bytes:
    """Pillow's resize of bytes to a square, whatever the shape was, as dgm-eval does before DINOv2.

    Columns go before rows, as in Pillow before version 13, which published numbers come from. Pillow 13 takes
    tall images the other way round where their width grows, which moves noise by some 20 levels.

    Args:
        images: (n, h, w, 3), values in [0, 255]; floats are rounded to bytes first.
        size: Side of the square output, pixels.

    Returns:
        (n, size, size, 3).
    """

    def one(image: Image.Image) -> Image.Image:
        columns = image.resize((size, image.height), Image.Resampling.BICUBIC)
        return columns.resize((size, size), Image.Resampling.BICUBIC)

    return _each(images, one)


def crop_and_resize(images: NDArray[Any], size: int) -> Bytes:
    """The central square, then Pillow's resize of bytes, as CMMD does (``_center_crop_and_resize``).

    Args and returns: see :func:`squash`.
    """

    def one(image: Image.Image) -> Image.Image:
        side = min(image.size)
        left, top = ((extent - side) // 2 for extent in image.size)
        square = image.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.BICUBIC)

    return _each(images, one)


def resize_and_crop(images: NDArray[Any], size: int) -> Bytes:
    """Pillow's resize of bytes until the shorter side fits, then the central square.

    As CLIP's own preprocessing and clean-fid's before CLIP, by torchvision's ``Resize`` and ``CenterCrop``.

    Args and returns: see :func:`squash`.
    """

    def one(image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        # Rounded down, as torchvision does; the division comes last.
        width, height = (size if extent == shorter else int(size * extent / shorter) for extent in image.size)
        # Rounded to an even number where it is halfway.
        left, top = round((width - size) / 2), round((height - size) / 2)
        fitted = image.resize((width, height), Image.Resampling.BICUBIC)
        return fitted.crop((left, top, left + size, top + size))

    return _each(images, one)


def _each(images: NDArray[Any], change: Any) -> Bytes:
    if images.dtype != np.uint8:
        images = np.rint(images).clip(0, 255).astype(np.uint8)
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])
