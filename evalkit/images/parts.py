"""Several files of images as one source, named by a pattern such as ``parts/*.npz``."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, listing
from evalkit.images.source import ImageSource
from evalkit.system.progress import Progress
from evalkit.system.ranges import fetch_each
from evalkit.system.storage import Place, matching
from evalkit.system.urls import after_host, is_url, scheme_of, shown, without_query

__all__ = ["Parts", "is_pattern", "open_parts"]

_MOST_NOTES = 8

T = TypeVar("T")


def is_pattern(source: str | os.PathLike[str]) -> bool:
    """Whether this is a pattern of paths, with ``*``, ``?``, ``[...]`` or ``**``, and no existing path.

    In ``https://``, where ``?`` begins the query, it is none.
    """
    if is_url(source):
        text = str(source)
        is_web = scheme_of(text) in ("http", "https")
        if is_web:
            return bool(re.search(r"[*[]", after_host(without_query(text))))
        return bool(re.search(r"[*[?]", shown(text)))
    try:
        return glob.has_magic(os.fspath(source)) and not Path(source).exists()
    except OSError:  # a name that is too long, a folder that is not ours
        return False


def open_parts(pattern: str, open_one: Callable[[Place], ImageSource]) -> Parts:
    """Open all files and folders that match a pattern, in the order of their sorted names.

    Args:
        pattern: As :func:`is_pattern` tells.
        open_one: Opens one of them.

    Raises:
        InputError: Nothing matches, or the parts do not go together.
    """
    if is_url(pattern):
        if not (places := matching(pattern)):
            raise InputError(f"{shown(pattern)}: no file or folder matches this pattern.")
        return Parts(shown(pattern), list(fetch_each(open_one, places, threads=4)))
    paths = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes none from the root
    if "[" in pattern:
        # Brackets that are part of a name, and not a choice of characters.
        literal = sorted(glob.glob(pattern.replace("[", "[[]"), recursive=True))  # noqa: PTH207
        if paths and literal:
            raise InputError(
                f"{pattern}: can be read in two ways, as {listing(paths, 2)} or as {listing(literal, 2)}. "
                "Write [[] for a bracket that is part of a name"
            )
        paths = paths or literal
    if not paths:
        brackets = " Brackets were tried as part of a name, too." if "[" in pattern else ""
        raise InputError(f"{pattern}: no file or folder matches this pattern.{brackets}")
    return Parts(pattern, [open_one(Path(path)) for path in paths])


class Parts(ImageSource):
    """Several sources of equally large images, one after the other.

    Attributes:
        parts: The sources, in their order.
    """

    def __init__(self, name: str, parts: Sequence[ImageSource]) -> None:
        first = parts[0]
        for part in parts:
            if part.statistics is not None:
                raise InputError(
                    f"{part.name}: has mu and sigma, which are not those of all parts of {name}; "
                    f"expected only images"
                )
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise InputError(
                    f"{part.name}: {part.dtype} images of shape {part.shape}, but {first.name} has "
                    f"{first.dtype} {first.shape}; expected one size and type in all parts of {name}"
                )
        super().__init__(name, "parts", sum(map(len, parts)), first.shape, first.dtype)
        self.parts = tuple(parts)
        labels = [part.labels for part in parts if part.labels is not None]
        if len(labels) == len(parts):
            self.labels = np.concatenate(labels)
        elif labels:
            self.labels_problem = f"The labels are left out: {len(labels)} of {len(parts)} parts have them."
            self.notes += (self.labels_problem,)
        self.value_range = None  # the parts have applied theirs
        notes = Counter(note.replace(part.name, "a part") for part in parts for note in part.notes)
        for note, count in notes.most_common(_MOST_NOTES):
            self.notes += (f"{note} (So in {count} of {len(parts)} parts of {name}.)",)
        if len(notes) > _MOST_NOTES:
            self.notes += (f"{len(notes) - _MOST_NOTES:,} more notes on parts of {name} are not shown.",)

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        """Yield batches across the ends of parts, so that all but the last are full."""
        pieces: list[NDArray[Any]] = []
        missing = size
        for images in self._read_parts(size, start):
            while len(images):
                pieces.append(images[:missing])
                images = images[missing:]
                missing -= len(pieces[-1])
                if not missing:
                    yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
                    pieces, missing = [], size
        if pieces:
            yield np.concatenate(pieces)

    def _read_parts(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        for part in self.parts:
            if start < len(part):
                yield from part.checked_batches(size, start)  # here, so that a message names the part
                if self.is_remote:
                    part.check_unchanged()
            start = max(0, start - len(part))

    def _examine(self, progress: Progress | None) -> dict[str, Any]:
        content, done = [], 0
        self._report(progress, done)
        for part, digest in zip(self.parts, self._on_each(lambda part: part.digest), strict=True):
            content.append((len(part), digest))
            done += len(part)
            self._report(progress, done)
        digests = Counter(digest for _, digest in content)
        parts = zip(self.parts, content, strict=True)
        if again := [part.name for part, (_, digest) in parts if digests[digest] > 1]:
            self.notes += (f"Some parts of {self.name} hold the same images: {listing(again)}.",)
        return {"digest": hashlib.sha256(f"parts {content}".encode()).hexdigest()}

    def check_unchanged(self, *, every_file: bool = False) -> None:
        """Check every part; see :meth:`ImageSource.check_unchanged`."""
        # Those at URLs are checked as each is read, and not all of them again and again.
        if every_file or not self.is_remote:
            for _ in self._on_each(lambda part: part.check_unchanged(every_file=every_file)):
                pass

    def _can_hash_ahead(self) -> bool:
        return all(part._can_hash_ahead() for part in self.parts)

    def shows_changes(self) -> bool:
        """See :meth:`ImageSource.shows_changes`."""
        return all(part.shows_changes() for part in self.parts)

    @property
    def is_remote(self) -> bool:
        """Whether the parts are read from URLs."""
        return self.parts[0].is_remote

    def _on_each(self, function: Callable[[ImageSource], T]) -> Iterator[T]:
        """Call it with each part; at URLs with a few at the same time."""
        return fetch_each(function, self.parts, threads=4) if self.is_remote else map(function, self.parts)
