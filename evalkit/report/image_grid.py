"""A grid of images: many small ones on one picture, a frame around each."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from evalkit.errors import OutputError
from evalkit.system.files import check_writable, replace_atomically
from evalkit.system.storage import Place

__all__ = ["check_picture", "grid", "write_grid"]

FRAME = 1
GREY = 48
# Images smaller than this are enlarged by a whole factor, so that their pixels can be seen.
LEGIBLE_SIDE = 40
FONT_SIZE = 16


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


def write_grid(
    path: Place, images: NDArray[np.uint8], columns: int | None = None, names: Sequence[str] = ()
) -> None:
    """Write :func:`grid` as a PNG, atomically; with names of the rows on its left, if given.

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
    with replace_atomically(path) as partial, partial.open("wb") as file:
        picture.save(file, format="PNG")
