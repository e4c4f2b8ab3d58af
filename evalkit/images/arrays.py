"""Arrays of images, in memory or in an npy file; and the layout and npy headers that other readers check."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, listing
from evalkit.images.reading import MAX_IMAGE_BYTES, READ_ERRORS, Candidate, readable
from evalkit.images.source import ImageSource
from evalkit.system.storage import Place, Remote, file_or_path, size_of

__all__ = [
    "Array",
    "Layout",
    "Npy",
    "NpyHeader",
    "SupportsArray",
    "check_layout",
    "check_only_images",
    "fill",
    "open_array",
    "parallel_reader",
    "read_npy_header",
]


_READ_THREADS = min(4, os.cpu_count() or 1)
_PIECE = 2**23
"""Bytes that one thread reads at a time."""


class SupportsArray(Protocol):
    """Anything NumPy can turn into an array, such as a torch tensor on the CPU."""

    def __array__(self) -> NDArray[Any]: ...


class Array(ImageSource):
    """An array in memory."""

    def __init__(self, array: NDArray[Any]) -> None:
        shape = check_layout("<array>", array.shape, array.dtype)
        super().__init__("<array>", "array", len(array), shape, array.dtype)
        self._array = array

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        for first in range(start, len(self), size):
            yield np.array(self._array[first : first + size], order="C")  # a copy: consumers may write


def open_array(source: SupportsArray) -> Array:
    """Open an array, or what NumPy can turn into one.

    Raises:
        InputError: It is none, or not one of images.
    """
    if not hasattr(source, "__array__"):
        raise InputError(
            f"cannot read images from a {type(source).__name__}; expected a path or an array. Stack images "
            "with np.stack, and give several files as a pattern such as 'parts/*.npz'"
        )
    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:  # torch: on another device, or requires grad
        raise InputError(f"<array>: {type(source).__name__} cannot become a NumPy array: {error}") from error
    if array.ndim == 0:
        raise InputError("<array>: a single number; expected four axes, (n, height, width, 3)")
    return Array(array)


class Npy(ImageSource):
    """An array in a file of its own.

    It is read and not mapped, because a file that shrinks under a map ends the process. Its hash is not
    remembered: a program that writes through a map may change no time of the file.
    """

    _remembered = False

    def __init__(self, path: Place) -> None:
        name = str(path)
        with path.open("rb") as file:
            header = read_npy_header(name, file, size_of(path))
        shape = check_layout(name, header.shape, header.dtype)
        super().__init__(name, "npy", header.shape[0], shape, header.dtype)
        self._path = path
        self._remembered = isinstance(path, Remote) and path.scheme != "file"
        self._header = header
        self.reads_in_order = header.fortran
        self.reads_in_pieces = not header.fortran

    @classmethod
    def claims(cls, candidate: Candidate) -> bool:
        """Whether the file begins as npy files do."""
        return candidate.head.startswith(b"\x93NUMPY")

    def _paths(self) -> Sequence[Place]:
        return [self._path]

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        header = self._header
        if header.fortran:
            with readable(self.name), file_or_path(self._path) as file:
                array = np.load(file, allow_pickle=False)
                for first in range(start, len(self), size):
                    yield np.array(array[first : first + size], order="C")
            return
        offset = header.length + start * math.prod(header.shape[1:]) * header.dtype.itemsize
        with readable(self.name), parallel_reader(self._path, offset) as read:
            for first in range(start, len(self), size):
                batch = np.empty((min(size, len(self) - first), *header.shape[1:]), header.dtype)
                read(batch)
                yield batch


def fill(stream: IO[bytes], array: NDArray[Any]) -> None:
    """Read the bytes of a whole array in C order; EOFError if there are too few."""
    # zipfile gives fewer bytes only at the end of the member, and with its last byte compares the checksum.
    if stream.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:  # type: ignore[attr-defined]
        raise EOFError("the array ends early")


@contextmanager
def parallel_reader(path: Place, offset: int) -> Iterator[Callable[[NDArray[Any]], None]]:
    """What reads one array after the other from a file, as :func:`fill` does, by several threads.

    One thread copies only a few GB/s out of the system's cache. A file at a URL reads ahead by itself.
    """
    if isinstance(path, Remote):
        with path.open() as remote:
            remote.seek(offset)
            yield partial(fill, remote)
        return
    with path.open("rb") as file, ThreadPoolExecutor(_READ_THREADS, "read") as pool:
        file.seek(offset)

        def read(array: NDArray[Any]) -> None:
            view = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            start = file.tell()

            def read_piece(begin: int) -> None:
                end = min(begin + _PIECE, len(view))
                while begin < end:
                    count = os.preadv(file.fileno(), [view[begin:end]], start + begin)
                    if not count:
                        raise EOFError("the array ends early")
                    begin += count

            if len(view) <= _PIECE or not hasattr(os, "preadv"):  # Windows
                fill(file, array)
                return
            list(pool.map(read_piece, range(0, len(view), _PIECE)))
            file.seek(start + len(view))

        yield read


# --------------------------------------------------------------------------------------------- headers


class NpyHeader(NamedTuple):
    """The header of an npy file; ``length`` is its own, in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    length: int


def read_npy_header(name: str, file: IO[bytes], size: int, *, any_type: bool = False) -> NpyHeader:
    """Read the header of an npy file of ``size`` bytes and check it before anything is allocated.

    Args:
        name: The file, for messages.
        file: Read from its beginning.
        size: Bytes of the whole file.
        any_type: Accept types that are never loaded, pickled objects and Unicode field names, because only
            the header is wanted.

    Raises:
        InputError: It is not valid, does not fit the size, or announces pickled objects.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0) or (any_type and version == (3, 0)):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:  # 3.0 exists for field names in Unicode, which images do not have
            raise ValueError(f"npy format {version}; expected 1.0 or 2.0")
    except READ_ERRORS:
        raise
    except Exception as error:  # NumPy parses the header as Python source, and lets the parser's errors out
        raise InputError(
            f"{name}: not a valid npy header ({error}); write it with np.save or np.savez"
        ) from error
    if dtype.hasobject and any_type:
        return NpyHeader(shape, dtype, fortran, file.tell())
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
    return NpyHeader(shape, dtype, fortran, length)


# ---------------------------------------------------------------------------------------------- layout


def check_layout(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """Height, width and 3 of an array of images.

    Raises:
        InputError: It is not ``(n, height, width, 3)`` of integers or floats; the message says what to do.
    """
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        hint = "; of bfloat16, save x.float()" if dtype.kind == "V" else ""
        raise InputError(f"{name}: an array of type {dtype}; expected integers or floats in [0, 255]{hint}")
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


class Layout(NamedTuple):
    """Type and shape of an array in a file."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    @property
    def is_of_images(self) -> bool:
        """Whether these are images as they should be."""
        return len(self.shape) == 4 and self.shape[-1] == 3

    @property
    def may_be_of_images(self) -> bool:
        """Whether these are images in any layout."""
        return len(self.shape) >= 4


def check_only_images(name: str, arrays: Mapping[str, Layout]) -> None:
    """Raise an InputError for several arrays of images, of which only one would be measured."""
    # What np.savez calls arr_1, arr_2 ... are further batches, in whatever layout.
    alike = [
        f"{key} {layout}"
        for key, layout in arrays.items()
        if layout.is_of_images or (key.startswith("arr_") and layout.may_be_of_images)
    ]
    if len(alike) > 1:
        raise InputError(
            f"{name}: holds {len(alike):,} arrays of images, {listing(alike)}; expected one, arr_0. Join "
            "them with np.savez(path, np.concatenate(batches)), or give each a file of its own and a "
            "pattern for all"
        )
