"""A folder of features: one HDF5 file for every :data:`SHARD` images of a batch.

Each file is written under a temporary name and renamed when it is complete. So a run may be killed at any
moment: the next one finds only complete files, and resumes after the last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from evalkit.errors import OutputError
from evalkit.extractors.base import Extractor, Rows
from evalkit.images import ImageSource
from evalkit.system.files import remove_stale_partials, replace_atomically
from evalkit.system.space import check_free_space

__all__ = ["SHARD", "StoredBatch", "spans"]

SHARD = 512
"""Images in one file of the store: what a killed run may have to repeat. A power of two."""

FORMAT = "evalkit store 3"

_ELSEWHERE = "Free some space, point EVALKIT_CACHE elsewhere or use --no-store."


def spans(n: int) -> list[tuple[int, int]]:
    """First image of each shard of a batch of n, and the one after its last."""
    return [(begin, min(begin + SHARD, n)) for begin in range(0, n, SHARD)]


class StoredBatch:
    """The features of one batch through one network, as a folder of the store.

    The folder is keyed on the content of the images and the extractor's fingerprint: any other pixel, weight
    or setting gives another. Several processes may use one store at once: a file appears whole or not at all,
    and two that write the same file write the same features.
    """

    def __init__(self, root: Path, images: ImageSource, extractor: Extractor):
        key = json.dumps([FORMAT, images.digest, len(images), extractor.fingerprint, SHARD])
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]
        self._files = [self.folder / f"{begin:08d}-{end:08d}.h5" for begin, end in spans(len(images))]
        self._name = images.name
        self._bytes = 4 * len(images) * sum(extractor.outputs.values())

    def prepare(self) -> None:
        """Make the folder, and check that there is room for what is missing."""
        with _saying_what_to_do(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale_partials(self.folder)
            there = sum(file.stat().st_size for file in self.folder.glob("*.h5"))
        what = f"The feature store {self.folder.parent}, for {self._name},"
        check_free_space(self.folder, self._bytes - there, what, _ELSEWHERE)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, ascending."""
        # The folder is listed, because a network file system may remember that a file was not there.
        there = set(self.folder.iterdir())
        return [number for number, file in enumerate(self._files) if file not in there]

    def is_complete(self) -> bool:
        """Whether all shards are there; may be asked before :meth:`prepare`."""
        return self.folder.is_dir() and not self.missing()

    def read(self, number: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Rows] | None:
        """The outputs of these shapes of a shard; None where it is damaged or not there."""
        shard = {output: np.empty(shape, np.float32) for output, shape in shapes.items()}
        try:
            with h5py.File(self._files[number], "r") as file:
                for output, array in shard.items():
                    file[output].read_direct(array)
        except (OSError, KeyError, TypeError, ValueError, AttributeError):
            return None
        return shard

    def remove(self, number: int) -> None:
        """Forget a shard."""
        with _saying_what_to_do(self.folder):
            self._files[number].unlink(missing_ok=True)

    def write(self, number: int, shard: Mapping[str, Rows]) -> None:
        """Keep a shard, with a checksum."""
        with (
            _saying_what_to_do(self.folder),
            replace_atomically(self._files[number]) as partial,
            h5py.File(partial, "w") as file,
        ):
            for output, array in shard.items():
                file.create_dataset(output, data=array, chunks=array.shape, fletcher32=True)


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
