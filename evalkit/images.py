"""Where images come from: npz archives, folders, zips, tars, HDF5 files and arrays, all read the same way.

The main path is two lines::

    images = open_images("samples.npz")
    for batch in images.batches(64):  # (n, height, width, 3), uint8, or float32 where the file holds floats
        ...

Opening makes the cheap checks (is the file there, its kind, its header, its statistics); pixels are checked
while they stream past. No container is ever held in memory whole, except arrays in Fortran order.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
import os
import struct
import zipfile
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol, Self, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalkit.errors import ImageError, InputError
from evalkit.files import replace_atomically
from evalkit.image_files import (
    DECODERS,
    MAX_IMAGE_BYTES,
    READ_ERRORS,
    ImageFiles,
    check_member_name,
    is_image,
    open_image_files,
    readable,
)

__all__ = ["ImageSource", "NpzWriter", "SupportsArray", "is_pattern", "open_images", "read_ahead"]

T = TypeVar("T")

_DECODING_THREADS = min(8, os.cpu_count() or 1)
_STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


class SupportsArray(Protocol):
    """Anything NumPy can turn into an array, such as a torch tensor on the CPU."""

    def __array__(self) -> NDArray[Any]: ...


class ImageSource(ABC):
    """A sequence of equally large RGB images, in a fixed order, read in batches.

    A new kind of source implements ``_read`` and, where hashing every pixel would be a waste, ``_digest``.

    Attributes:
        name: The path as it was given, or ``"<array>"``.
        kind: ``"npz"``, ``"npy"``, ``"folder"``, ``"zip"``, ``"tar"``, ``"parquet"``, ``"hdf5"``, ``"array"``
            or, of several files, ``"parts"``.
        shape: ``(height, width, 3)`` of every image; None where there are statistics and no images.
        dtype: ``uint8``, or ``float32`` for files that hold floats (in [0, 255] all the same).
        labels: ``(n,)`` int64, one class an image (npz ``arr_1``, HDF5 ``labels`` or ``arr_1``), or None.
        statistics: ``mu`` (2048,), ``sigma`` (2048, 2048), ``mu_s`` (2023,) and ``sigma_s`` (2023, 2023) of
            the reference evaluator, finite floats as the file holds them, or None.
        provenance: The record that evalkit writes into an npz of how it was made, or None.
        notes: What the user should know and that is no error, a sentence each.
    """

    def __init__(
        self, name: str, kind: str, count: int, shape: tuple[int, int, int] | None, dtype: np.dtype[Any]
    ) -> None:
        self.name = name
        self.kind = kind
        self.shape = shape
        self.dtype = np.dtype(np.float32 if dtype.kind == "f" else np.uint8)
        self.labels: NDArray[np.int64] | None = None
        self.statistics: Mapping[str, NDArray[Any]] | None = None
        self.provenance: Mapping[str, Any] | None = None
        self.notes: tuple[str, ...] = ()
        self._count = count
        self._stored_dtype = dtype

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}: {len(self)} images of shape {self.shape}, {self.dtype}>"

    @cached_property
    def digest(self) -> str:
        """Hex sha256 that identifies the pixels and their order within one kind of container.

        An npz or zip is identified by the checksums in its directory, which takes no time and makes stored
        and deflated the same; folders and tars by the bytes of their images; HDF5 and arrays by their values;
        several files by the digests of each.
        """
        return self._digest()

    def batches(self, size: int, start: int = 0) -> Generator[NDArray[Any], None, None]:
        """Yields the images from ``start`` on, read ahead in a background thread.

        May be called any number of times. Closing the generator, or dropping it, ends its threads.

        Args:
            size: Images a batch; the last batch may hold fewer.
            start: Index of the first image.

        Yields:
            ``(n, height, width, 3)``, of type :attr:`dtype`, values in [0, 255], C order, writable.

        Raises:
            ImageError: An image is corrupt, of another size, or has values that are not finite or outside
                [0, 255]; the message names it.
            InputError: The container is damaged.
            ValueError: ``size`` is not positive, or ``start`` lies outside the source.
        """
        if size < 1:
            raise ValueError(f"size is {size}; expected at least 1")
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}; expected 0 to {len(self)}, the number of images")
        return read_ahead(self._checked(size, start))

    @abstractmethod
    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        """Yields batches as they are stored: any real dtype, values unchecked."""

    def _digest(self) -> str:
        dtype = self._stored_dtype.newbyteorder("<")
        digest = hashlib.sha256(f"array {dtype.str} {(len(self), *(self.shape or ()))}\n".encode())
        for batch in self._read(64, 0):
            digest.update(np.ascontiguousarray(batch, dtype).data)
        return digest.hexdigest()

    def _checked(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        first = start
        for batch in self._read(size, start):
            if batch.dtype != np.uint8:
                outside = ~((batch >= 0) & (batch <= 255))  # NaN compares false, so it is outside too
                if outside.any():
                    index = first + int(outside.reshape(len(batch), -1).any(axis=1).argmax())
                    raise ImageError(
                        f"{self.name}: image {index} (counted from 0) holds the value {batch[outside][0]}; "
                        f"expected finite numbers from 0 to 255"
                    )
            yield batch.astype(self.dtype, copy=False)
            first += len(batch)

    def _take_labels(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], load: Callable[[], NDArray[Any]]
    ) -> None:
        """Keeps one integer an image; anything else is only noted, as the metrics do without labels."""
        if shape == (len(self),) and dtype.kind in "ui":
            self.labels = load().astype(np.int64)
        else:
            self.notes += (f"The labels are left out: expected {len(self)} integers, found {dtype} {shape}.",)

    def _look_at_floats(self) -> None:
        """Refuses floats that are scaled for a network: as pixels in [0, 255] they would all be black."""
        if self.dtype != np.float32:
            return
        self.notes += ("The pixels are floats; they are used as they are, not rounded to 8 bits.",)
        batch = next(iter(self._read(16, 0)))
        low, high = batch.min(), batch.max()
        if low >= -1 and high <= 1 and (low, high) != (0, 0):
            scale, convert = ("[0, 1]", "x * 255") if low >= 0 else ("[-1, 1]", "(x + 1) * 127.5")
            raise InputError(
                f"{self.name}: the first images hold floats from {low:.3g} to {high:.3g}, scaled to "
                f"{scale} it seems; expected [0, 255]. "
                f"Convert with ({convert}).round().clip(0, 255).astype(np.uint8)"
            )


def open_images(source: str | os.PathLike[str] | SupportsArray) -> ImageSource:
    """Opens images, whatever they are kept in; the kind is told from the content, not from the suffix.

    - npz: ``arr_0`` as for the reference evaluator, with labels in ``arr_1`` and statistics if it has them.
      An npz with statistics and no images is a source of length 0.
    - folder, zip, tar (also compressed): image files (png, jpg, webp, bmp, tif, ppm) at any depth, in the
      order of their relative POSIX paths. Hidden files are left out. Pillow decodes them to RGB; as in other
      tools, EXIF orientation is not applied and of several frames the first counts. Nothing is extracted.
    - parquet, one file or a folder of them: a column of encoded images, with labels in ``label``.
    - HDF5: the dataset ``images`` or ``arr_0``, or the only one with four axes.
    - npy and arrays, also torch tensors on the CPU.
    - Several of these as one: a pattern such as ``parts/*.npz``, in the order of their sorted names
      (``10`` before ``9``). All of one size, without statistics; labels where all have them.

    Arrays are ``(n, height, width, 3)``, integers or floats, in [0, 255].

    Args:
        source: A path or an array.

    Raises:
        ImageError: The first image file is bad.
        InputError: The file is missing, is none of the above, is damaged, has no images, or they have the
            wrong shape, type or range; or its statistics are incomplete or not finite.
    """
    if not isinstance(source, str | os.PathLike):
        return _open_array(source)
    if not os.fspath(source):
        raise InputError("A path is empty. Give a file, a folder or a pattern; . is the current folder.")
    path = Path(source)
    if is_pattern(source):
        return _open_parts(str(path))
    with readable(str(path)):
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder")
        if not path.is_dir():
            with path.open("rb") as file:
                head = file.read(8)
            if head.startswith(b"PK") and _holds_arrays(path):
                return _Npz(path)
            if head.startswith(b"\x93NUMPY"):
                return _open_npy(path)
            if h5py.is_hdf5(path):
                return _Hdf5(path)
        if files := open_image_files(path):
            return _Decoded(files)
    raise InputError(
        f"{path}: its content (first bytes {head!r}) is that of no known container; "
        f"expected an npz, npy, zip, tar or HDF5 file or a folder of images"
    )


def is_pattern(source: str | os.PathLike[str]) -> bool:
    """Whether this is no path of anything, but a pattern of paths: with ``*``, ``?``, ``[...]`` or ``**``."""
    return glob.has_magic(os.fspath(source)) and not Path(source).exists()


def _open_parts(pattern: str) -> ImageSource:
    paths = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes none from the root
    if not paths:
        raise InputError(f"{pattern}: no file or folder matches this pattern")
    return _Parts(pattern, [open_images(path) for path in paths])


def _holds_arrays(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
    return any(name.suffix == ".npy" for name in names) and not any(map(is_image, names))


def read_ahead(iterator: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yields the same items while a background thread already produces the next ones.

    An exception of the iterator is raised where its item would have come. When the generator is closed or
    dropped, or the consumer is interrupted, the item in progress is finished, the iterator closed and the
    thread ended.

    Args:
        iterator: Where the items come from.
        depth: How many items may wait, besides the one that the consumer holds.
    """
    items, end = iter(iterator), object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        try:
            waiting = deque(thread.submit(next, items, end) for _ in range(depth))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            thread.shutdown(cancel_futures=True)
            if isinstance(items, Generator):
                items.close()


# --------------------------------------------------------------------------------------------- writing


class NpzWriter:
    """Writes an npz as the reference evaluator reads it, its images a batch at a time.

    ::

        with NpzWriter.create(path, (50_000, 256, 256, 3)) as writer:
            for batch in batches:
                writer.append(batch)
            writer.add("arr_1", labels)

    The file is stored uncompressed, with zip64 sizes and without times: the same arrays give the same bytes.
    It appears whole when the block ends; when the block fails, what was at ``path`` before stays.
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
    def create(cls, path: Path, shape: tuple[int, int, int, int]) -> Iterator[Self]:
        """Opens ``path`` for ``(n, height, width, 3)`` images.

        Raises:
            OutputError: The file cannot be written.
            ValueError: The images were not ``n`` in all: the caller's mistake.
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
        """Writes ``(b, height, width, 3)`` uint8 after those that are there; ValueError for anything else."""
        if images.dtype != np.uint8 or images.shape[1:] != self.shape[1:]:
            raise ValueError(f"{images.dtype} {images.shape}; expected uint8 of shape (b, *{self.shape[1:]})")
        self._arr_0.write(np.ascontiguousarray(images).data)
        self.images += len(images)

    def add(self, key: str, array: NDArray[Any]) -> None:
        """Writes another array, of any type but objects, once all images are written."""
        self._end_images()
        with self._member(key) as member:
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)

    def _member(self, key: str) -> IO[bytes]:
        return self._archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True)

    def _end_images(self) -> None:
        if self.images != self.shape[0]:
            raise ValueError(f"{self.images} images were appended; {self.shape[0]} were announced")
        self._arr_0.close()


# ---------------------------------------------------------------------------------------------- arrays


def _check_layout(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """Returns (height, width, 3), or says what is wrong with an array of images."""
    if dtype.kind not in "uif":
        raise InputError(f"{name}: an array of type {dtype}; expected integers or floats in [0, 255]")
    if len(shape) != 4:
        raise InputError(f"{name}: an array of shape {shape}; expected four axes, (n, height, width, 3)")
    _, height, width, channels = shape
    if channels != 3:
        advice = {
            1: "repeat the grey channel with np.repeat(x, 3, axis=3)",
            4: "flatten the alpha channel, or drop it with x[..., :3] if it is opaque",
        }.get(channels, "expected 3 channels, last")
        if height == 3:
            advice = "this looks like NCHW, transpose with x.transpose(0, 2, 3, 1)"
        raise InputError(f"{name}: an array of shape {shape}; expected (n, height, width, 3): {advice}")
    if min(shape) < 1:
        raise InputError(f"{name}: an array of shape {shape} is empty; expected at least one image")
    if height * width * 3 * dtype.itemsize > MAX_IMAGE_BYTES:
        raise InputError(f"{name}: an array of shape {shape}; one image may have {MAX_IMAGE_BYTES} bytes")
    return height, width, 3


class _Array(ImageSource):
    """An array, possibly a memory map."""

    def __init__(self, name: str, kind: str, array: NDArray[Any]) -> None:
        super().__init__(name, kind, len(array), _check_layout(name, array.shape, array.dtype), array.dtype)
        self._array = array
        self._look_at_floats()

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        for first in range(start, len(self), size):
            yield np.array(self._array[first : first + size], order="C")  # a copy: consumers may write


def _open_array(source: SupportsArray) -> ImageSource:
    if not hasattr(source, "__array__"):
        raise InputError(f"cannot read images from a {type(source).__name__}; expected a path or an array")
    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:  # torch: on another device, or requires grad
        raise InputError(f"<array>: {type(source).__name__} cannot become a NumPy array: {error}") from error
    if array.ndim == 0:
        raise InputError("<array>: a single number; expected four axes, (n, height, width, 3)")
    return _Array("<array>", "array", array)


class _NpyHeader(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    length: int


def _read_npy_header(name: str, file: IO[bytes], size: int) -> _NpyHeader:
    """Reads the header of an npy file of ``size`` bytes and checks it before anything is allocated."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:  # 3.0 exists for field names in Unicode, which images do not have
            raise ValueError(f"npy format {version}; expected 1.0 or 2.0")
    except READ_ERRORS:
        raise
    except Exception as error:  # NumPy parses the header as Python source, and lets the parser's errors out
        raise InputError(
            f"{name}: no valid npy header ({error}); write it with np.save or np.savez"
        ) from error
    if dtype.hasobject:
        raise InputError(
            f"{name}: holds pickled Python objects, which could run code and are never loaded; "
            f"save a plain array of numbers, for example np.stack(images)"
        )
    length = file.tell()
    if min(shape, default=0) < 0 or length + math.prod(shape) * dtype.itemsize != size:
        raise InputError(
            f"{name}: {size} bytes, but its header announces shape {shape} of {dtype} after {length} bytes; "
            f"the file is damaged or was not written completely"
        )
    return _NpyHeader(shape, dtype, fortran, length)


def _open_npy(path: Path) -> ImageSource:
    name = str(path)
    with path.open("rb") as file:
        header = _read_npy_header(name, file, path.stat().st_size)
    _check_layout(name, header.shape, header.dtype)
    return _Array(name, "npy", np.load(path, mmap_mode="r", allow_pickle=False))


class _Npz(ImageSource):
    """The reference evaluator's format: arrays in a zip, streamed out of it."""

    def __init__(self, path: Path) -> None:
        name = str(path)
        with readable(name), zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            for member in members:
                check_member_name(name, member)
            keys = [member.removesuffix(".npy") for member in members if member.endswith(".npy")]
            statistics = _read_statistics(name, archive, keys)
            if "arr_0" in keys:
                header = _npz_header(name, archive, "arr_0")
                shape = _check_layout(f"{name}, arr_0", header.shape, header.dtype)
                super().__init__(name, "npz", header.shape[0], shape, header.dtype)
                self._header = header
                if "arr_1" in keys:
                    labels = _npz_header(name, archive, "arr_1")
                    self._take_labels(
                        labels.shape, labels.dtype, lambda: _npz_array(archive, "arr_1", labels)
                    )
            elif statistics:
                super().__init__(name, "npz", 0, None, np.dtype(np.uint8))
                self.notes += (f"{name} holds statistics and no images.",)
            else:
                raise InputError(
                    f"{name}: has no arr_0, the images; its keys are {', '.join(sorted(keys))}. "
                    f"Save them with np.savez(path, images)"
                )
            self.statistics = statistics
            self.provenance = _read_provenance(name, archive, keys)
            content = ["arr_0.npy"] if self.shape else [f"{key}.npy" for key in _STATISTICS]
            self._checksums = [(info.CRC, info.file_size) for info in map(archive.getinfo, content)]
        if self.shape:
            self._look_at_floats()
            if self._header.fortran:
                self.notes += ("The array is in Fortran order, so it is loaded into memory whole.",)

    def _digest(self) -> str:
        identity = f"npz {self._checksums}"
        if self.shape:
            header = self._header
            identity += f" {header.dtype.str} {header.shape} {'F' if header.fortran else 'C'}"
        return hashlib.sha256(identity.encode()).hexdigest()

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        if not self.shape:
            return
        header = self._header
        with readable(self.name), zipfile.ZipFile(self.name) as archive:
            if header.fortran:
                array = _npz_array(archive, "arr_0", header)
                for first in range(start, len(self), size):
                    yield np.array(array[first : first + size], order="C")
                return
            offset = start * math.prod(self.shape) * header.dtype.itemsize
            with _npz_stream(archive, "arr_0", header, offset) as stream:
                for first in range(start, len(self), size):
                    batch = np.empty((min(size, len(self) - first), *self.shape), header.dtype)
                    _fill(stream, batch)
                    yield batch


@contextmanager
def _npz_stream(archive: zipfile.ZipFile, key: str, header: _NpyHeader, offset: int) -> Iterator[IO[bytes]]:
    """The values of an array from byte ``offset`` on."""
    info = archive.getinfo(f"{key}.npy")
    if not offset or info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as stream:
            stream.read(header.length)
            if offset:  # newer Pythons compare no checksum after a seek, so the whole is read without one
                stream.seek(offset, os.SEEK_CUR)
            yield stream
        return
    # zipfile before Python 3.13 would read all that comes before.
    with Path(str(archive.filename)).open("rb") as file:
        file.seek(info.header_offset)
        signature, *lengths = struct.unpack("<4s22x2H", file.read(30))  # of the name and the extra field
        if signature != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"{key} does not begin where the directory says")
        file.seek(sum(lengths) + header.length + offset, os.SEEK_CUR)
        yield file


def _fill(stream: IO[bytes], array: NDArray[Any]) -> None:
    # zipfile gives fewer bytes only at the end of the member, and with its last byte compares the checksum.
    if stream.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:  # type: ignore[attr-defined]
        raise EOFError("the array ends early")


def _npz_header(name: str, archive: zipfile.ZipFile, key: str) -> _NpyHeader:
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as stream:
        return _read_npy_header(f"{name}, {key}", stream, info.file_size)


def _npz_array(archive: zipfile.ZipFile, key: str, header: _NpyHeader) -> NDArray[Any]:
    array = np.empty(math.prod(header.shape), header.dtype)
    with archive.open(f"{key}.npy") as stream:
        stream.read(header.length)
        _fill(stream, array)
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def _read_statistics(name: str, archive: zipfile.ZipFile, keys: list[str]) -> dict[str, NDArray[Any]] | None:
    if not _STATISTICS.keys() & set(keys):
        return None
    missing = [key for key in _STATISTICS if key not in keys]
    if missing:
        raise InputError(
            f"{name}: has statistics without {', '.join(missing)}; expected all of {', '.join(_STATISTICS)}. "
            f"Statistics of other tools, which have only mu and sigma, cannot stand in for these"
        )
    statistics = {}
    for key, shape in _STATISTICS.items():
        header = _npz_header(name, archive, key)
        if header.shape != shape or header.dtype.kind != "f":
            raise InputError(
                f"{name}: {key} is {header.dtype} of shape {header.shape}; expected floats of shape {shape}"
            )
        array = _npz_array(archive, key, header)
        if not np.isfinite(array).all():
            raise InputError(f"{name}: {key} holds values that are not finite; compute the statistics again")
        statistics[key] = array.astype(header.dtype.newbyteorder("="))
    return statistics


def _read_provenance(name: str, archive: zipfile.ZipFile, keys: list[str]) -> dict[str, Any] | None:
    if "provenance" not in keys:
        return None
    header = _npz_header(name, archive, "provenance")
    if header.shape or header.dtype.kind != "U":  # somebody else's key of that name
        return None
    try:
        record = json.loads(str(_npz_array(archive, "provenance", header)))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class _Hdf5(ImageSource):
    """One dataset of an HDF5 file, read by slices."""

    def __init__(self, path: Path) -> None:
        name = str(path)
        with readable(name), h5py.File(path, "r") as file:
            datasets: dict[str, Any] = {}
            file.visititems(
                lambda key, node: datasets.update({key: node} if isinstance(node, h5py.Dataset) else {})
            )
            with_four_axes = [key for key, dataset in datasets.items() if dataset.ndim == 4]
            named = [key for key in ("images", "arr_0") if key in datasets]
            if not named and len(with_four_axes) != 1:
                found = ", ".join(f"{key} {dataset.shape}" for key, dataset in datasets.items()) or "none"
                raise InputError(
                    f"{name}: which dataset holds the images? "
                    f"Expected images, arr_0 or only one with four axes; found {found}"
                )
            self._key = (named or with_four_axes)[0]
            dataset = datasets[self._key]
            shape = _check_layout(f"{name}, {self._key}", dataset.shape or (), dataset.dtype)
            super().__init__(name, "hdf5", len(dataset), shape, dataset.dtype)
            labels = datasets.get("labels", datasets.get("arr_1"))
            if labels is not None:
                self._take_labels(labels.shape, labels.dtype, lambda: labels[:])
        self._look_at_floats()

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        with readable(self.name), h5py.File(self.name, "r") as file:
            dataset = file[self._key]
            for first in range(start, len(self), size):
                yield dataset[first : first + size]


# ------------------------------------------------------------------------------------------- in parts


class _Parts(ImageSource):
    """Several sources of equally large images, one after the other."""

    def __init__(self, name: str, parts: Sequence[ImageSource]) -> None:
        first = parts[0]
        for part in parts:
            if part.statistics is not None:
                raise InputError(
                    f"{part.name}: carries mu and sigma, which are not those of all parts of {name}; "
                    f"expected images alone"
                )
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise InputError(
                    f"{part.name}: {part.dtype} images of shape {part.shape}, but {first.name} has "
                    f"{first.dtype} {first.shape}; expected one size and type in all parts of {name}"
                )
        super().__init__(name, "parts", sum(map(len, parts)), first.shape, first.dtype)
        self._parts = parts
        labels = [part.labels for part in parts if part.labels is not None]
        if len(labels) == len(parts):
            self.labels = np.concatenate(labels)
        elif labels:
            self.notes += (f"The labels are left out: {len(labels)} of {len(parts)} parts have them.",)
        for note, count in Counter(note for part in parts for note in part.notes).items():
            self.notes += (f"{note} (So in {count} of {len(parts)} parts of {name}.)",)

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        """Batches that go over the ends of parts, so that these make no difference to what follows."""
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
        for part in self._parts:
            if start < len(part):
                yield from part._checked(size, start)  # here, so that a message names the part
            start = max(0, start - len(part))

    def _digest(self) -> str:
        content = [(len(part), part.digest) for part in self._parts]
        return hashlib.sha256(f"parts {content}".encode()).hexdigest()


# ----------------------------------------------------------------------------------------- image files


class _Decoded(ImageSource):
    """Image files that all have one size, decoded by a pool of threads."""

    def __init__(self, files: ImageFiles) -> None:
        super().__init__(files.name, files.kind, len(files), None, np.dtype(np.uint8))
        self._files = files
        self._first_size: tuple[int, int] | None = None
        with closing(files.read([0])) as first:
            height, width, _ = self._decode(next(first)).shape
        self._first_size = (width, height)
        self.shape = (height, width, 3)
        self.labels = files.labels
        self.notes += files.notes

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        indices = range(start, len(self))
        with ThreadPoolExecutor(_DECODING_THREADS) as pool, closing(self._files.read(indices)) as encoded:
            # map takes its arguments in this thread: archives are read in order, only decoding is parallel.
            while images := list(pool.map(self._decode, islice(encoded, size))):
                yield np.stack(images)

    def _decode(self, encoded: tuple[str, bytes | InputError]) -> NDArray[np.uint8]:
        """Returns (height, width, 3)."""
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
        """The image, its pixels not yet decoded, if its header says what is expected."""
        where = f"{self.name}, {name}"
        try:
            with Image.open(io.BytesIO(data), formats=DECODERS) as image:
                width, height = image.size
                if self._first_size not in (None, image.size):
                    raise ImageError(
                        f"{where}: {width}x{height} pixels, but the first image, {self._files.names[0]}, has "
                        f"{'x'.join(map(str, self._first_size or ()))}; expected one size for all"
                    )
                if width * height * 3 > MAX_IMAGE_BYTES:
                    raise ImageError(
                        f"{where}: {width}x{height} pixels; limited to {MAX_IMAGE_BYTES // 3} pixels"
                    )
                if image.mode.startswith(("I", "F")):
                    raise ImageError(
                        f"{where}: Pillow mode {image.mode}, more than 8 bits a channel; convert it to 8 bits"
                    )
                yield image
        except ImageError:
            raise
        except Exception as error:  # on damaged data Pillow's decoders raise almost anything
            raise ImageError(
                f"{where}: cannot be decoded ({type(error).__name__}: {error}); replace or remove it"
            ) from error

    def _look(self, name: str, data: bytes) -> None:
        """Finds at the beginning what would else end the work after hours."""
        with self._opened(name, data):
            pass

    def _digest(self) -> str:
        return self._files.digest(self._look)
