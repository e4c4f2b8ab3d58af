"""ADM's crop of training and reference images, on all cores."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalkit.errors import ImageError, InputError
from evalkit.images import ImageFiles, ImageSource
from evalkit.images.decode import decode_rgb
from evalkit.images.reading import MAX_IMAGE_BYTES

__all__ = ["Crop", "Pixels", "center_crop", "cropped"]

Pixels: TypeAlias = NDArray[np.uint8]

_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Crop:
    """A cropped image of a source.

    Attributes:
        index: Its place in the source.
        digest: sha256 of the file, or of the pixels before the crop; empty if they could not be read.
        pixels: (size, size, 3), or why there are none.
    """

    index: int
    digest: bytes
    pixels: Pixels | ImageError


def cropped(
    items: ImageFiles | ImageSource,
    indices: NDArray[np.int64],
    size: int,
    count: int,
    pool: ThreadPoolExecutor,
) -> Iterator[list[Crop]]:
    """Yield the images with these ascending indices, cropped to ``size`` pixels, ``count`` at a time."""
    with closing(_contents(items, indices)) as contents:
        while batch := list(islice(contents, count)):
            yield list(pool.map(partial(_crop, size), batch))


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


def _crop(size: int, item: tuple[int, str, bytes | Image.Image | InputError]) -> Crop:
    index, where, content = item
    if isinstance(content, InputError):
        return Crop(index, b"", ImageError(str(content)))
    digest = hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest()
    try:
        image = decode_rgb(where, content) if isinstance(content, bytes) else content
        return Crop(index, digest, center_crop(where, image, size))
    except ImageError as error:
        return Crop(index, digest, error)


def _contents(
    items: ImageFiles | ImageSource, indices: NDArray[np.int64]
) -> Generator[tuple[int, str, bytes | Image.Image | InputError], None, None]:
    """Yield (index, name for messages, file content or image) of these ascending indices."""
    if isinstance(items, ImageFiles):
        with closing(items.read(indices.tolist())) as contents:
            for index, (name, content) in zip(indices.tolist(), contents, strict=True):
                yield index, f"{items.name}, {name}", content
        return
    wanted = set(indices.tolist())
    first = min(wanted, default=0)
    with closing(items.batches(_BATCH_SIZE, start=first)) as batches:
        for batch in batches:
            for index, pixels in enumerate(np.rint(batch).astype(np.uint8), first):
                if index in wanted:
                    yield index, f"{items.name}, image {index}", Image.fromarray(pixels)
            first += len(batch)
