"""Grids of images: many small ones on one picture, a frame around each; and sheets of several such blocks."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from evalkit.errors import OutputError, brief
from evalkit.system.files import check_writable, replace_atomically
from evalkit.system.storage import Place

__all__ = ["Block", "base_name", "check_picture", "grid", "write_grid", "write_sheet"]

FRAME = 1
GREY = 48
# Images smaller than this are enlarged by a whole factor, so that their pixels can be seen.
LEGIBLE_SIDE = 40
FONT_SIZE = 16
# Likewise where a caption stands below each image.
CAPTIONED_SIDE = 64
CAPTION_SIZE = 12
CAPTION_HEIGHT = 16


def grid(images: NDArray[np.uint8], columns: int | None = None) -> NDArray[np.uint8]:
    """Images in rows, from left to right.

    Args:
        images: (n, height, width, 3) uint8.
        columns: Images a row; by default such that the grid is about square.

    Returns:
        (rows * height', columns * width', 3) uint8, where small images are enlarged without smoothing and
        each has a dark frame. Cells that are left over are dark too.
    """
    n, height, width, _ = images.shape
    columns = min(n, columns or round((n * height / width) ** 0.5) or 1)
    rows = -(-n // columns)
    factor = max(1, LEGIBLE_SIDE // min(height, width))
    cells = np.full(
        (rows * columns, height * factor + 2 * FRAME, width * factor + 2 * FRAME, 3), GREY, np.uint8
    )
    cells[:n, FRAME:-FRAME, FRAME:-FRAME] = images.repeat(factor, axis=1).repeat(factor, axis=2)
    _, height, width, _ = cells.shape
    return cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, -1, 3)


def check_picture(path: Place, *inputs: str | os.PathLike[str]) -> None:
    """Cheap check before long work that a grid can be written to ``path``.

    Raises:
        OutputError: It cannot, is one of the inputs, or does not end in ``.png``.
    """
    if path.suffix.lower() != ".png":
        raise OutputError(f"Cannot write {path}: a grid of images ends in .png.")
    check_writable(path, *inputs)


def base_name(name: str) -> str:
    """The last part of the path or URL of a batch, for a picture; cut where it is long."""
    return brief(PurePosixPath(name).name or name)


def write_grid(
    path: Place,
    images: NDArray[np.uint8],
    columns: int | None = None,
    names: Sequence[str] = (),
    *,
    title: str,
    description: str,
) -> None:
    """Write :func:`grid` as a PNG, atomically; with names of the rows on its left, if given.

    Args:
        path: The file.
        images: Of :func:`grid`.
        columns: Likewise.
        names: One for each row, or none.
        title: What the picture shows, in a few words; in the PNG's text chunk of that name.
        description: What it shows, of which files; likewise.

    Raises:
        OutputError: The file cannot be written.
    """
    picture = Image.fromarray(grid(images, columns))
    if names:
        font = ImageFont.load_default(FONT_SIZE)
        margin = FONT_SIZE + max(round(font.getlength(name)) for name in names)
        framed = Image.new("RGB", (margin + picture.width, picture.height), "white")
        framed.paste(picture, (margin, 0))
        row = picture.height / len(names)
        for index, name in enumerate(names):
            ImageDraw.Draw(framed).text(
                (margin / 2, (index + 0.5) * row), name, fill="black", font=font, anchor="mm"
            )
        picture = framed
    _save(path, picture, title, description)


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """Images of one kind on a sheet.

    Attributes:
        heading: One or more lines above them.
        images: (n, height, width, 3) uint8.
        captions: One or more short lines below each; as many for all.
    """

    heading: str
    images: NDArray[np.uint8]
    captions: Sequence[str]


def write_sheet(path: Place, blocks: Sequence[Block], *, title: str, description: str) -> None:
    """Write blocks of images below each other as a PNG, atomically.

    Args:
        path: The file.
        blocks: At least one. Each is a :func:`grid` below its heading.
        title: See :func:`write_grid`.
        description: Likewise.

    Raises:
        OutputError: The file cannot be written.
    """
    font = ImageFont.load_default(FONT_SIZE)
    grids = [Image.fromarray(grid(_captioned(block))) for block in blocks]
    headings = [block.heading.split("\n") for block in blocks]
    lengths = [2 * FONT_SIZE + math.ceil(max(map(font.getlength, lines))) for lines in headings]
    width = max(*lengths, *(picture.width for picture in grids))
    line = 2 * FONT_SIZE
    height = sum(line * len(lines) for lines in headings) + sum(picture.height for picture in grids)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for lines, picture in zip(headings, grids, strict=True):
        for text in lines:
            ImageDraw.Draw(sheet).text(
                (FONT_SIZE, top + line // 2), text, fill="black", font=font, anchor="lm"
            )
            top += line
        sheet.paste(picture, (0, top))
        top += picture.height
    _save(path, sheet, title, description)


def _captioned(block: Block) -> NDArray[np.uint8]:
    """(n, height', width', 3): the images, enlarged by a whole factor where small, on their captions."""
    n, height, width, _ = block.images.shape
    factor = math.ceil(CAPTIONED_SIDE / min(height, width, CAPTIONED_SIDE))
    images = block.images.repeat(factor, axis=1).repeat(factor, axis=2)
    font = ImageFont.load_default(CAPTION_SIZE)
    strip_height = CAPTION_HEIGHT * len(block.captions[0].split("\n"))
    strips = np.empty((n, strip_height, width * factor, 3), np.uint8)
    for strip, caption in zip(strips, block.captions, strict=True):
        drawn = Image.new("RGB", (width * factor, strip_height), "white")
        for number, text in enumerate(caption.split("\n")):
            middle = (width * factor / 2, CAPTION_HEIGHT * (number + 0.5))
            ImageDraw.Draw(drawn).text(middle, text, fill="black", font=font, anchor="mm")
        strip[:] = np.asarray(drawn)
    return np.concatenate([images, strips], axis=1)


def _save(path: Place, picture: Image.Image, title: str, description: str) -> None:
    """Write the picture, with what it shows for readers and for those who cannot see it."""
    told = PngInfo()
    told.add_itxt("Title", title)
    told.add_itxt("Description", description)
    with replace_atomically(path) as partial, partial.open("wb") as file:
        picture.save(file, format="PNG", pnginfo=told)
