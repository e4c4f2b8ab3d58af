"""The decoder of pictures: Pillow, held to a few formats, with damage as ImageErrors.

There are two ways to RGB. :class:`Decoded`, which measures images, refuses any picture that has more than
RGB of 8 bits can hold. :func:`decode_rgb`, which prepares reference batches, converts as ADM did.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from evalkit.errors import ImageError, InputError
from evalkit.images.files import ImageFiles
from evalkit.images.reading import MAX_IMAGE_BYTES
from evalkit.images.source import ImageSource
from evalkit.system.files import kind_of
from evalkit.system.progress import Progress
from evalkit.system.storage import Place

__all__ = ["DECODERS", "Decoded", "decode_rgb"]

DECODERS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Naming the decoders keeps Pillow's many others (some start external programs) away from untrusted files."""

_THREADS = min(8, os.cpu_count() or 1)
# Chunks of a PNG that hold no pixels. Pillow unpacks them, and refuses an image with a megabyte of text.
_PNG_TEXT = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}


class Decoded(ImageSource):
    """Image files that all have one size, decoded by a pool of threads."""

    def __init__(self, files: ImageFiles) -> None:
        super().__init__(files.name, files.kind, len(files), None, np.dtype(np.uint8))
        self._files = files
        self._first_size: tuple[int, int] | None = None
        with closing(files.read([0])) as first:
            height, width, _ = self._decode(next(first)).shape
        self._first_size = (width, height)
        self.shape = (height, width, 3)
        self.labels, self.labels_problem = files.labels, files.labels_problem
        self.notes += files.notes
        self.reads_in_order = files.reads_in_order
        self.reads_in_pieces = files.reads_in_pieces

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        return self.decoded(size, range(start, len(self)))

    def decoded(self, size: int, indices: Iterable[int]) -> Generator[NDArray[np.uint8], None, None]:
        """Yield the images of these ascending indices, in batches; no other file is read.

        Raises:
            ImageError: An image is corrupt, or of another size than the first.
            InputError: The container is damaged.
        """
        with ThreadPoolExecutor(_THREADS) as pool, closing(self._files.read(indices)) as encoded:
            # map takes its arguments in this thread: archives are read in order, only decoding is parallel.
            while images := list(pool.map(self._decode, islice(encoded, size))):
                yield np.stack(images)

    def _decode(self, encoded: tuple[str, bytes | InputError]) -> NDArray[np.uint8]:
        """Decode one image to (height, width, 3)."""
        name, data = encoded
        if isinstance(data, InputError):
            raise data
        with self._opened(name, data) as image:
            if not image.has_transparency_data:
                return np.asarray(image.convert("RGB"))
            rgba = np.asarray(image.convert("RGBA"))
        if rgba[..., 3].min() < 255:
            raise ImageError(
                f"{self.name}, {name}: has transparent pixels; flatten it onto the background you want"
            )
        return rgba[..., :3]

    @contextmanager
    def _opened(self, name: str, data: bytes) -> Iterator[Image.Image]:
        """Open an image, its pixels not yet decoded, and check its header."""
        where = f"{self.name}, {name}"
        with _opened(where, data) as image:
            width, height = image.size
            if self._first_size not in (None, image.size):
                raise ImageError(
                    f"{where}: {width}x{height} pixels, but the first image, {self._files.names[0]}, has "
                    f"{'x'.join(map(str, self._first_size or ()))}; expected one size for all"
                )
            _check_pixels(where, image)
            if image.mode.startswith(("I", "F")):
                raise ImageError(
                    f"{where}: Pillow mode {image.mode}, more than 8 bits a channel; convert it to 8 bits"
                )
            yield image

    def _paths(self) -> Sequence[Place]:
        return self._files.paths()

    def _examine(self, progress: Progress | None) -> dict[str, Any]:
        done = animated = 0
        self._report(progress, done)

        def look(name: str, data: bytes) -> None:
            nonlocal done, animated
            with self._opened(name, data) as image:  # here, because a bad header would end the work later
                animated += bool(getattr(image, "is_animated", False))
            done += 1
            self._report(progress, done)

        return {"digest": self._files.digest(look), "animated": animated}

    def identify(self, progress: Progress | None = None) -> str:
        """Hash the files' bytes, and note images of several frames; see :meth:`ImageSource.identify`."""
        known = self._found is not None
        digest = super().identify(progress)
        if not known and (animated := (self._found or {}).get("animated")):
            self.notes += (
                f"{animated:,} images of {self.name} have several frames; only the first is used.",
            )
        return digest


def decode_rgb(where: str, data: bytes) -> Image.Image:
    """Decode an image file to 8-bit RGB as the reference preprocessing does: Pillow's ``convert("RGB")``.

    EXIF orientation is not applied, transparency is dropped and not blended, CMYK is converted without a
    colour profile, and only the first of several frames is used. Grey of 16 bits keeps its upper 8, as Pillow
    does with colours of 16 bits; ``convert`` alone would turn nearly all of it white.

    Args:
        where: Name of the image for messages.
        data: The file's content.

    Raises:
        ImageError: It cannot be decoded, is cut short, too large, or has 32 bits a channel.
    """
    with _opened(where, data) as image:
        _check_pixels(where, image)
        if image.mode.startswith("I;16"):
            upper = (np.asarray(image) >> 8).astype(np.uint8)
            return Image.fromarray(upper).convert("RGB")
        if image.mode in ("I", "F"):
            raise ImageError(
                f"{where}: Pillow mode {image.mode}, 32 bits a channel; convert it to 8 or 16 bits"
            )
        # First to RGBA, because Pillow warns about transparency in palettes; the colours are the same.
        return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


@contextmanager
def _opened(where: str, data: bytes) -> Iterator[Image.Image]:
    """An encoded image opened by Pillow; what it raises then or in the block becomes an ImageError."""
    try:
        with _open(data) as image:
            yield image
    except ImageError:
        raise
    except Exception as error:  # on damaged data Pillow's decoders raise almost anything
        raise ImageError(
            f"{where}: cannot be decoded ({type(error).__name__}: {error}); replace or remove it"
        ) from error


def _check_pixels(where: str, image: Image.Image) -> None:
    if image.width * image.height * 3 > MAX_IMAGE_BYTES:
        raise ImageError(
            f"{where}: {image.width}x{image.height} pixels; limited to {MAX_IMAGE_BYTES // 3} pixels"
        )


def _open(data: bytes) -> Image.Image:
    """Open an encoded image with Pillow, its pixels not yet decoded; close it after use.

    Text and colour profiles of PNG files, which change no pixel, are left out first.

    Raises:
        Exception: On damaged data, almost any.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        data = _without_text(data)
    try:
        return Image.open(io.BytesIO(data), formats=DECODERS)
    except UnidentifiedImageError as error:
        what = kind_of(data[:64])
        reason = error if "single" in what or "unknown" in what else f"it is {what}"
        raise ValueError(reason) from None


def _without_text(data: bytes) -> bytes:
    """A PNG without the chunks that hold no pixels; from a damaged chunk on it stays as it is."""
    kept, start, place = [], 0, 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            break
        if kind in _PNG_TEXT:
            kept.append(data[start:place])
            start = end
        place = end
    return b"".join([*kept, data[start:]]) if kept else data
