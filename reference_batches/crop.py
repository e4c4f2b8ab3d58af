"""ADM's crop of training and reference images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalkit.errors import ImageError, InputError
from evalkit.images.decode import decode_rgb
from evalkit.images.reading import MAX_IMAGE_BYTES

__all__ = ["Crop", "Pixels", "center_crop", "crop"]

Pixels: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Crop:
    """A cropped image of a source.

    Attributes:
        digest: sha256 of the file, or of the pixels before the crop; empty if they could not be read.
        pixels: (size, size, 3), or why there are none.
    """

    digest: bytes
    pixels: Pixels | ImageError


def crop(where: str, content: bytes | Image.Image | InputError, size: int) -> Crop:
    """Decode the content of a file, or take an image, and crop it; a bad one is not raised.

    Args:
        where: Name of the image for messages.
        content: The file's, the image, or why it could not be read.
        size: Side of the square, pixels.
    """
    if isinstance(content, InputError):
        return Crop(b"", ImageError(str(content)))
    digest = hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest()
    try:
        image = decode_rgb(where, content) if isinstance(content, bytes) else content
        return Crop(digest, center_crop(where, image, size))
    except ImageError as error:
        return Crop(digest, error)


def center_crop(where: str, image: Image.Image, size: int) -> Pixels:
    """The crop of ADM's training and reference images.

    While the shorter side is at least twice ``size``, both sides are halved with a box filter; then the
    shorter side is brought to ``size`` with a bicubic filter, and the centre is cut out.

    Args:
        where: Name of the image for messages.
        image: RGB.
        size: Side of the square, pixels.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ImageError: The image is so narrow that its longer side would need hundreds of megabytes.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height * 3 > MAX_IMAGE_BYTES:
        raise ImageError(f"{where}: {image.width}x{image.height} pixels, too narrow to be scaled to {size}")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]
