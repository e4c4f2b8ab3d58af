"""Some images of a source, by their indices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.images.decode import Decoded
from evalkit.images.parts import Parts
from evalkit.images.source import ImageSource

__all__ = ["chosen_images"]

_SIZE = 16


def chosen_images(images: ImageSource, indices: Sequence[int]) -> NDArray[Any]:
    """The images of these indices, in this order, without reading the others where that can be avoided.

    Args:
        images: The source.
        indices: From 0, in any order, at least one.

    Returns:
        (n, height, width, 3) of the source's type, values in [0, 255].

    Raises:
        ImageError: One of them is bad.
        InputError: The container is damaged.
    """
    ascending, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
    if ascending[0] < 0 or ascending[-1] >= len(images):
        raise ValueError(f"indices from {ascending[0]} to {ascending[-1]}; there are {len(images)} images")
    found = np.concatenate([*_ascending(images, ascending.tolist())])
    chosen: NDArray[Any] = found[places]
    return chosen


def _ascending(images: ImageSource, indices: list[int]) -> Iterator[NDArray[Any]]:
    if isinstance(images, Decoded):
        yield from images.decoded(_SIZE, indices)
    elif isinstance(images, Parts):
        first = 0
        for part in images.parts:
            inside = [index - first for index in indices if first <= index < first + len(part)]
            if inside:
                yield from _ascending(part, inside)
            first += len(part)
    elif images.reads_in_order:
        first = indices[0]
        with closing(images.batches(_SIZE, first, indices[-1] + 1)) as batches:
            for batch in batches:
                yield batch[[index - first for index in indices if first <= index < first + len(batch)]]
                first += len(batch)
    else:
        for index in indices:
            yield from images.checked_batches(1, index, index + 1)
