"""The reference evaluator's format: an npz with images, labels and statistics, streamed out of the zip."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, listing
from evalkit.images.archives import check_member_name, check_zip, is_pytorch
from evalkit.images.arrays import (
    Layout,
    NpyHeader,
    check_layout,
    check_only_images,
    fill,
    parallel_reader,
    read_npy_header,
)
from evalkit.images.names import is_image
from evalkit.images.reading import Candidate, readable
from evalkit.images.source import ImageSource
from evalkit.images.statistics import check_finite, check_header, one_pair_note
from evalkit.layouts import LAYOUTS, SHAPES
from evalkit.system.storage import Place, file_or_path

__all__ = ["STATISTICS", "Npz", "array_header", "load_array"]

STATISTICS = {key: SHAPES[key] for key in LAYOUTS["adm"].keys}
"""Keys of the reference evaluator's statistics, and their shapes."""

# What other tools call them.
_OTHER_NAMES = {
    name: key
    for layout in LAYOUTS.values()
    for key, name in layout.keys.items()
    if layout.suffix == ".npz" and name not in STATISTICS
}

_PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))
# Keys that evalkit itself writes next to the images.
_OUR_KEYS = {"provenance", "indices"}


class Npz(ImageSource):
    """Images in ``arr_0``, labels in ``arr_1`` and statistics, each where the file has them."""

    def __init__(self, path: Place) -> None:
        name = str(path)
        self._path = path
        with readable(name), file_or_path(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            for member in members:
                check_member_name(name, member)
            notes = check_zip(path, archive)
            keys = [member.removesuffix(".npy") for member in members if member.endswith(".npy")]
            names = _names_of_statistics(keys)
            statistics = _read_statistics(name, archive, names)
            used = {*_OUR_KEYS, *names.values()}
            if "arr_0" in keys:
                header = array_header(name, archive, "arr_0")
                shape = check_layout(f"{name}, arr_0", header.shape, header.dtype)
                super().__init__(name, "npz", header.shape[0], shape, header.dtype)
                self._header = header
                is_stored = archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
                self.reads_in_order = header.fortran or not is_stored
                self.reads_in_pieces = not header.fortran
                others = {key: _layout(name, archive, key) for key in dict.fromkeys(keys) if key not in used}
                check_only_images(name, others)
                if "arr_1" in keys:
                    labels = array_header(name, archive, "arr_1")
                    self._take_labels(
                        "arr_1", labels.shape, labels.dtype, lambda: load_array(archive, "arr_1", labels)
                    )
                unused = [
                    f"{key} ({layout})" for key, layout in others.items() if key not in ("arr_0", "arr_1")
                ]
            elif statistics:
                super().__init__(name, "npz", 0, None, np.dtype(np.uint8))
                self.notes += (f"{name} holds statistics and no images.",)
                unused = [key for key in keys if key not in used]
            else:
                raise InputError(
                    f"{name}: has no arr_0, the images; its keys are {listing(sorted(keys))}. "
                    f"Save them with np.savez(path, images)"
                )
            self.statistics = statistics
            self.provenance = _read_provenance(name, archive, keys)
        if unused:
            notes += (f"Arrays of {name} that are not used: {listing(unused)}.",)
        if statistics and len(statistics) == 2:
            notes += (one_pair_note(name, names, bool(self.shape)),)
        self.notes += notes
        if self.shape and self._header.fortran:
            self.notes += ("The array is in Fortran order, so it is loaded into memory whole.",)

    @classmethod
    def claims(cls, candidate: Candidate) -> bool:
        """Whether it is a zip that holds arrays and no image files."""
        if not candidate.head.startswith(b"PK"):
            return False
        with file_or_path(candidate.path) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        members = [PurePosixPath(name) for name in names]
        has_arrays = any(member.suffix == ".npy" for member in members)
        return has_arrays and not any(map(is_image, members)) and not is_pytorch(names)

    def _paths(self) -> Sequence[Place]:
        return [self._path]

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        if not self.shape:
            return
        header = self._header
        with readable(self.name), file_or_path(self._path) as file, zipfile.ZipFile(file) as archive:
            if header.fortran:
                array = load_array(archive, "arr_0", header)
                for first in range(start, len(self), size):
                    yield np.array(array[first : first + size], order="C")
                return
            offset = start * math.prod(self.shape) * header.dtype.itemsize
            # The checksum is compared in this process once, where all is read from the beginning.
            with _reader(self._path, archive, header, offset, checked=self._examined) as read:
                for first in range(start, len(self), size):
                    batch = np.empty((min(size, len(self) - first), *self.shape), header.dtype)
                    read(batch)
                    yield batch


@contextmanager
def _reader(
    path: Place, archive: zipfile.ZipFile, header: NpyHeader, offset: int, *, checked: bool
) -> Iterator[Callable[[NDArray[Any]], None]]:
    """What reads the values of the images from byte ``offset`` on, one array after the other.

    Args:
        path: The file.
        archive: The same, opened.
        header: Of its images.
        offset: Where to begin.
        checked: Whether the file's checksum was compared before. If not, it is, unless there is an offset.
    """
    info = archive.getinfo("arr_0.npy")
    if info.compress_type != zipfile.ZIP_STORED or not (checked or offset):
        with archive.open(info) as stream:
            stream.read(header.length)
            # After a seek newer Pythons compare no checksum, so reading from the beginning does without.
            if offset:
                stream.seek(offset, os.SEEK_CUR)
            yield partial(fill, stream)
        return
    # zipfile would compute the checksum, at half of the speed; before Python 3.13, of all that comes before.
    with path.open("rb") as file:
        file.seek(info.header_offset)
        signature, *lengths = struct.unpack("<4s22x2H", file.read(30))  # of the name and the extra field
        if signature != b"PK\x03\x04":
            raise zipfile.BadZipFile("arr_0 does not begin where the directory says")
        begin = file.tell() + sum(lengths) + header.length
    with parallel_reader(path, begin + offset) as read:
        yield read


def array_header(name: str, archive: zipfile.ZipFile, key: str, *, any_type: bool = False) -> NpyHeader:
    """The header of an array; see :func:`evalkit.images.arrays.read_npy_header`."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as stream:
        return read_npy_header(f"{name}, {key}", stream, info.file_size, any_type=any_type)


def _layout(name: str, archive: zipfile.ZipFile, key: str) -> Layout:
    """Type and shape of an array that may not be used."""
    try:
        header = array_header(name, archive, key, any_type=True)
    except InputError:
        return Layout("damaged", ())
    return Layout(str(header.dtype), header.shape)


def load_array(archive: zipfile.ZipFile, key: str, header: NpyHeader) -> NDArray[Any]:
    """The array whose header was read and checked."""
    array = np.empty(math.prod(header.shape), header.dtype)
    with archive.open(f"{key}.npy") as stream:
        stream.read(header.length)
        fill(stream, array)
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def _names_of_statistics(keys: list[str]) -> dict[str, str]:
    """What the file calls mean and covariance, by our names; or else by another tool's."""
    found = {key: key for key in keys if key in STATISTICS}
    found = found or {_OTHER_NAMES[key]: key for key in keys if key in _OTHER_NAMES}
    return {key: found[key] for key in STATISTICS if key in found}


def _read_statistics(
    name: str, archive: zipfile.ZipFile, names: Mapping[str, str]
) -> dict[str, NDArray[Any]] | None:
    missing = [key for pair in _PAIRS if set(pair) & set(names) for key in pair if key not in names]
    if missing:
        raise InputError(
            f"{name}: has {', '.join(names.values())} without {', '.join(missing)}; expected mu and sigma, "
            f"mu_s and sigma_s, or all of {', '.join(STATISTICS)}"
        )
    statistics = {}
    for key, place in names.items():
        header = array_header(name, archive, place)
        check_header(name, place, header.shape, header.dtype, STATISTICS[key])
        statistics[key] = check_finite(name, place, load_array(archive, place, header))
    return statistics or None


def _read_provenance(name: str, archive: zipfile.ZipFile, keys: list[str]) -> dict[str, Any] | None:
    if "provenance" not in keys:
        return None
    header = array_header(name, archive, "provenance")
    if header.shape or header.dtype.kind != "U":  # another program's key of that name
        return None
    try:
        record = json.loads(str(load_array(archive, "provenance", header)))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
