"""Writing images as the reference evaluator reads them: an npz, a batch at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from evalkit.system.files import replace_atomically
from evalkit.system.storage import Place

__all__ = ["NpzWriter"]


class NpzWriter:
    """Writes an npz as the reference evaluator reads it, its images a batch at a time.

    ::

        with NpzWriter.create(path, (50_000, 256, 256, 3)) as writer:
            for batch in batches:
                writer.append(batch)
            writer.add("arr_1", labels)

    The file is stored uncompressed, with zip64 sizes and without times: the same arrays give the same bytes.
    It appears whole when the block ends; when the block fails, the file that was at ``path`` before stays.
    """

    def __init__(self, archive: zipfile.ZipFile, shape: tuple[int, int, int, int]) -> None:
        self.shape = shape
        self.images = 0
        """How many images have been appended."""
        self._archive = archive
        self._arr_0 = self._member("arr_0")
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._arr_0, header)

    @classmethod
    @contextmanager
    def create(cls, path: Place, shape: tuple[int, int, int, int]) -> Iterator[Self]:
        """Open ``path`` for ``(n, height, width, 3)`` images.

        Raises:
            OutputError: The file cannot be written.
            ValueError: The images were not ``n`` in all, a mistake of the caller.
        """
        with (
            replace_atomically(path) as partial,
            zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        ):
            writer = cls(archive, shape)
            with writer._arr_0:
                yield writer
                writer._end_images()

    def append(self, images: NDArray[np.uint8]) -> None:
        """Write ``(b, height, width, 3)`` uint8 after the images so far; ValueError for anything else."""
        if images.dtype != np.uint8 or images.shape[1:] != self.shape[1:]:
            raise ValueError(f"{images.dtype} {images.shape}; expected uint8 of shape (b, *{self.shape[1:]})")
        self._arr_0.write(np.ascontiguousarray(images).data)
        self.images += len(images)

    def add(self, key: str, array: NDArray[Any]) -> None:
        """Write another array, of any type but objects, once all images are written."""
        self._end_images()
        with self._member(key) as member:
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)

    def _member(self, key: str) -> IO[bytes]:
        return self._archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True)

    def _end_images(self) -> None:
        if self.images != self.shape[0]:
            raise ValueError(f"{self.images} images were appended; {self.shape[0]} were announced")
        self._arr_0.close()
