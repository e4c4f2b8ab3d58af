"""PNG files inside a page: with their headings and descriptions, and small enough."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from evalkit.errors import InputError, brief, listing

__all__ = ["Picture", "fitted", "read_picture"]

PNG = b"\x89PNG\r\n\x1a\n"
MOST_PIXELS = 80_000_000
JPEG_QUALITY = 88
# The least size of a picture is this part of its own: smaller ones show nothing any more.
SMALLEST_PART = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture in a page.

    Attributes:
        path: Its file.
        heading: What the file says in ``Title``, or the file's name.
        description: What it says in ``Description``: the text for those who cannot see it.
        width: In pixels, of the file.
        height: Likewise.
        uri: The content, as a ``data:`` URL.
        note: How it differs from the file; empty if it does not.
    """

    path: Path
    heading: str
    description: str
    width: int
    height: int
    uri: str
    note: str = ""


def read_picture(path: Path) -> Picture:
    """A picture as it is in its file.

    Raises:
        InputError: There is no such file, it is no PNG, or it is damaged or too large.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Give a PNG file as a figure.") from error
    if not content.startswith(PNG):
        raise InputError(f"{path} is no PNG file. Give one, such as `evalkit compare --worst` draws.")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise InputError(
                    f"{path} has {width}x{height} pixels; a figure has at most {MOST_PIXELS:,}. Draw fewer "
                    "images, or smaller ones."
                )
            image.load()
            text = {name: str(found).strip() for name, found in image.text.items()}  # type: ignore[attr-defined]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: a damaged PNG file ({brief(error, 200)}). Draw it again.") from error
    return Picture(
        path=path,
        heading=text.get("Title") or path.name,
        description=text.get("Description") or f"{path.name}, a picture of {width}x{height} pixels",
        width=width,
        height=height,
        uri=_uri(content, "png"),
    )


def fitted(pictures: Sequence[Picture], most_bytes: int) -> list[Picture]:
    """The pictures as they are, or the largest of them as JPEG, at last at half its size and less.

    Raises:
        InputError: Even so they do not fit.
    """
    found = list(pictures)
    smaller = [_smaller(picture) for picture in pictures]
    while sum(len(picture.uri) for picture in found) > most_bytes:
        for number in sorted(range(len(found)), key=lambda number: len(found[number].uri), reverse=True):
            if (next_one := next(smaller[number], None)) is not None:
                found[number] = next_one
                break
        else:
            raise InputError(
                f"The figures do not fit into a page of 5 MB, even as small JPEG: "
                f"{listing(picture.path for picture in pictures)}. Give fewer of them."
            )
    return found


def _smaller(picture: Picture) -> Iterator[Picture]:
    """The same picture in less and less space."""
    content = base64.b64decode(picture.uri.partition(",")[2])
    with Image.open(io.BytesIO(content)) as opened:
        rgba = opened.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    scale = 1
    while scale <= SMALLEST_PART and min(image.size) >= scale:
        buffer = io.BytesIO()
        image.reduce(scale).save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
        uri = _uri(buffer.getvalue(), "jpeg")
        if len(uri) < len(picture.uri):
            size = "" if scale == 1 else f" at 1/{scale} of its size"
            yield Picture(
                path=picture.path,
                heading=picture.heading,
                description=picture.description,
                width=picture.width,
                height=picture.height,
                uri=uri,
                note=f"To keep the page small, this is a JPEG{size} of {picture.path.name}.",
            )
        scale *= 2


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
