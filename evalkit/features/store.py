"""The feature store: HDF5 files of pieces of a batch, ``<first image>-<image after the last>.h5``.

Each file is written under a temporary name and renamed when it is complete. So a run can be killed at any
time: the next run finds only complete files, and extracts what is missing. Files may overlap, and hold up to
one shard of images.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np
from numpy.typing import NDArray

from evalkit.errors import OutputError
from evalkit.extractors.base import Extractor, Rows
from evalkit.images import ImageSource
from evalkit.system.files import remove_stale_partials, replace_atomically
from evalkit.system.space import check_free_space

__all__ = ["SHARD", "Span", "StoredBatch", "spans"]

SHARD = 512
"""Images read at a time, and the maximum per file of the store. A power of two."""

FORMAT = "evalkit store 3"

Span: TypeAlias = tuple[int, int]
"""Consecutive images: index of the first, and index after the last."""

_ELSEWHERE = "Free some space, point EVALKIT_CACHE elsewhere or use --no-store."
_FILE = re.compile(r"(\d{8,})-(\d{8,})\.h5")


def spans(n: int) -> list[Span]:
    """The shards of a batch of n images."""
    return [(begin, min(begin + SHARD, n)) for begin in range(0, n, SHARD)]


class StoredBatch:
    """The features of one batch through one network, as a folder of the store.

    The folder's name is a hash of the content of the images and the extractor's fingerprint, so it changes
    with any pixel, weight or setting. Several processes may use the same store: files are written atomically,
    and all processes write the same features for the same images.
    """

    def __init__(self, root: Path, images: ImageSource, extractor: Extractor):
        key = json.dumps([FORMAT, images.digest, len(images), extractor.fingerprint, SHARD])
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]
        self._n = len(images)
        self._name = images.name
        self._bytes = 4 * len(images) * sum(extractor.outputs.values())
        self._listed: list[Span] | None = None

    def prepare(self) -> None:
        """Create the folder, and check that there is enough disk space for the missing features."""
        with _saying_what_to_do(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale_partials(self.folder)
            there = sum(file.stat().st_size for file in self.folder.glob("*.h5"))
        what = f"The feature store {self.folder.parent}, for {self._name},"
        check_free_space(self.folder, self._bytes - there, what, _ELSEWHERE)

    def missing(self) -> NDArray[np.bool_]:
        """(n,) booleans: whether the features of an image are missing. The folder is listed again."""
        missing = np.ones(self._n, bool)
        self._listed = None
        for begin, end in self._pieces():
            missing[begin:end] = False
        return missing

    def read(self, span: Span, outputs: Mapping[str, int]) -> dict[str, Rows] | None:
        """The rows of these images.

        Args:
            span: Images within one shard.
            outputs: The outputs to read and their widths.

        Returns:
            Rows by output; None if some of them are damaged or missing.
        """
        position, end = span
        rows = {output: np.empty((end - position, d), np.float32) for output, d in outputs.items()}
        for piece in self._pieces_in(span):
            if piece[0] <= position < piece[1] and position < end:
                stop = min(piece[1], end)
                parts = {key: array[position - span[0] : stop - span[0]] for key, array in rows.items()}
                if not self._read_into(parts, piece, position):
                    return None
                position = stop
        return rows if position == end else None

    def remove_damaged(self, span: Span, outputs: Mapping[str, int]) -> None:
        """Remove pieces of these images whose rows cannot be read."""
        for begin, end in self._pieces_in(span):
            parts = {output: np.empty((end - begin, d), np.float32) for output, d in outputs.items()}
            if not self._read_into(parts, (begin, end), begin):
                self.remove((begin, end))

    def remove(self, piece: Span) -> None:
        """Remove a piece."""
        with _saying_what_to_do(self.folder):
            self._file(piece).unlink(missing_ok=True)
        self._listed = None

    def write(self, piece: Span, rows: Mapping[str, Rows]) -> None:
        """Write the rows of a piece, with a checksum."""
        with (
            _saying_what_to_do(self.folder),
            replace_atomically(self._file(piece)) as partial,
            h5py.File(partial, "w") as file,
        ):
            for output, array in rows.items():
                file.create_dataset(output, data=array, chunks=array.shape, fletcher32=True)
        self._listed = None

    def _file(self, piece: Span) -> Path:
        return self.folder / f"{piece[0]:08d}-{piece[1]:08d}.h5"

    def _pieces(self) -> list[Span]:
        """Pieces in the store when it was last listed: ascending, longer ones first."""
        if self._listed is None:
            # Not by exists(): a network file system may cache that a file did not exist.
            names = [file.name for file in self.folder.iterdir()] if self.folder.is_dir() else []
            matches = (_FILE.fullmatch(name) for name in names)
            found = [(int(match[1]), int(match[2])) for match in matches if match]
            self._listed = sorted(
                ((begin, end) for begin, end in found if begin < end <= self._n),
                key=lambda piece: (piece[0], -piece[1]),
            )
        return self._listed

    def _pieces_in(self, span: Span) -> list[Span]:
        """Pieces that contain any of these images, which belong to one shard."""
        pieces = self._pieces()
        first, last = (
            bisect.bisect_left(pieces, image, key=lambda piece: piece[0])
            for image in (span[0] // SHARD * SHARD, span[1])
        )
        return [piece for piece in pieces[first:last] if piece[1] > span[0]]

    def _read_into(self, parts: Mapping[str, Rows], piece: Span, begin: int) -> bool:
        """Fill ``parts`` with a piece's rows, starting at image ``begin``; False if they cannot be read."""
        try:
            with h5py.File(self._file(piece), "r") as file:
                for output, array in parts.items():
                    if file[output].shape != (piece[1] - piece[0], array.shape[1]):
                        return False
                    first = begin - piece[0]
                    file[output].read_direct(array, np.s_[first : first + len(array)])
        except (OSError, KeyError, TypeError, ValueError, AttributeError):
            return False
        return True


@contextlib.contextmanager
def _saying_what_to_do(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"The feature store cannot be written at {folder}: {error.strerror or error}. "
            "Point EVALKIT_CACHE elsewhere or use --no-store."
        ) from error
    except OutputError as error:
        raise OutputError(
            f"{error} Features stored before are kept: free some space, point EVALKIT_CACHE elsewhere or use "
            "--no-store, and run the same command again."
        ) from error
