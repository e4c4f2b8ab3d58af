"""The bicubic resizes before DINOv2, CLIP and others, as each tool does them; all of them antialias.

Pillow resizes bytes and rounds to bytes after each pass, torch resizes floats and rounds nothing: the same
image comes out up to several grey levels apart.

Each resize takes images as arrays, (n, h, w, 3) with values in [0, 255], the side of the square result in
pixels, and a device. It returns (n, 3, size, size), float32, about [0, 255], on that device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evalkit.extractors.staging import upload

__all__ = [
    "CLIP",
    "HALF",
    "IMAGENET",
    "Resize",
    "Statistics",
    "crop_and_resize",
    "crop_and_resize_as_floats",
    "resize_and_crop",
    "scaled",
    "squash",
    "squash_as_floats",
    "standardised",
]

Resize: TypeAlias = Callable[[NDArray[Any], int, torch.device], Tensor]

Statistics: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels in [0, 1]."""

IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet."""

CLIP: Statistics = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images (``clip/clip.py`` of openai/CLIP)."""

HALF: Statistics = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""What brings pixels to [-1, 1]."""

CROP = 256
"""Side of the images that FD-loss measures, pixels."""


def scaled(images: Tensor, statistics: Statistics) -> Tensor:
    """``(x / 255 - mean) / std``, in float32 and in this order, as all of these tools round it.

    Args:
        images: (n, 3, h, w), float32, values in [0, 255].
        statistics: Of the images that the network was trained on.
    """
    return standardised(images / 255, statistics)


def standardised(images: Tensor, statistics: Statistics) -> Tensor:
    """``(x - mean) / std`` of (n, 3, h, w) float32 images about [0, 1], which are changed in place."""
    mean, std = _on_device(statistics, images.device)
    return images.sub_(mean).div_(std)


@lru_cache(maxsize=8)
def _on_device(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) each; made once, because every batch needs them and on a GPU the host waits for each copy."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in statistics)
    return mean, std


def squash_as_floats(images: NDArray[Any], size: int, device: torch.device) -> Tensor:
    """The resize of torch to a square, whatever the shape was; results may lie outside [0, 255].

    As EDM2's ``calculate_metrics.py`` does before DINOv2. Torch lacks it on MPS: there the result is on
    the CPU.
    """
    return F.interpolate(_planes(images, device), (size, size), mode="bicubic", antialias=True)


def crop_and_resize_as_floats(images: NDArray[Any], size: int, device: torch.device) -> Tensor:
    """ADM's centre crop to 256 pixels, then the resize of torch; results are about [0, 1].

    As FD-loss does. Images that are not of this size become bytes; those that are stay what they are. The
    crop halves images with a box filter while they are twice as large, brings the shorter side to 256 with a
    bicubic one, and cuts out the centre. Torch lacks its resize on MPS: there the result is on the CPU.
    """
    if images.shape[1:3] != (CROP, CROP):
        images = np.stack([_adm_crop(Image.fromarray(image)) for image in _as_bytes(images)])
    planes = _planes(images, device) / 255
    if size == CROP:
        return planes
    return F.interpolate(planes, (size, size), mode="bicubic", antialias=True)


def _adm_crop(image: Image.Image) -> NDArray[np.uint8]:
    while min(image.size) >= 2 * CROP:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = CROP / min(image.size)
    width, height = (round(extent * scale) for extent in image.size)
    left, top = (width - CROP) // 2, (height - CROP) // 2
    fitted = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(fitted.crop((left, top, left + CROP, top + CROP)))


def _planes(images: NDArray[Any], device: torch.device) -> Tensor:
    """(n, 3, h, w), float32; on the CPU in place of MPS."""
    # A copy: torch warns about read-only arrays.
    x = torch.from_numpy(np.array(images))
    if device.type != "mps":
        x = upload(x, device)
    # Not channels-last, for which torch on a CPU may round in another order.
    return x.permute(0, 3, 1, 2).float().contiguous()


def squash(images: NDArray[Any], size: int, device: torch.device) -> Tensor:
    """Pillow's resize of bytes to a square, whatever the shape was, as dgm-eval does before DINOv2.

    Columns go before rows, as in Pillow before version 13, which published numbers come from. Pillow 13 takes
    tall images the other way round where their width grows, which moves noise by some 20 levels.
    """

    def one(image: Image.Image) -> Image.Image:
        columns = image.resize((size, image.height), Image.Resampling.BICUBIC)
        return columns.resize((size, size), Image.Resampling.BICUBIC)

    return _each(images, device, one)


def crop_and_resize(images: NDArray[Any], size: int, device: torch.device) -> Tensor:
    """The central square, then Pillow's resize of bytes, as CMMD does (``_center_crop_and_resize``)."""

    def one(image: Image.Image) -> Image.Image:
        side = min(image.size)
        left, top = ((extent - side) // 2 for extent in image.size)
        square = image.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.BICUBIC)

    return _each(images, device, one)


def resize_and_crop(images: NDArray[Any], size: int, device: torch.device) -> Tensor:
    """Pillow's resize of bytes until the shorter side fits, then the central square.

    As CLIP's own preprocessing and clean-fid's before CLIP, by torchvision's ``Resize`` and ``CenterCrop``.
    """

    def one(image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        # Rounded down, as torchvision does; the division comes last.
        width, height = (size if extent == shorter else int(size * extent / shorter) for extent in image.size)
        # Rounded to an even number where it is halfway.
        left, top = round((width - size) / 2), round((height - size) / 2)
        fitted = image.resize((width, height), Image.Resampling.BICUBIC)
        return fitted.crop((left, top, left + size, top + size))

    return _each(images, device, one)


def _each(images: NDArray[Any], device: torch.device, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Change each image; floats are rounded to bytes first."""
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in _as_bytes(images)])
    return upload(torch.from_numpy(changed), device).permute(0, 3, 1, 2).float()


def _as_bytes(images: NDArray[Any]) -> NDArray[np.uint8]:
    return images if images.dtype == np.uint8 else np.rint(images).clip(0, 255).astype(np.uint8)
