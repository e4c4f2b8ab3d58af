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
import json
import math
import os
import re
import struct
import zipfile
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalkit.errors import ImageError, InputError, listing
from evalkit.images.files import (
    MAX_IMAGE_BYTES,
    READ_ERRORS,
    ImageFiles,
    check_member_name,
    check_zip,
    is_image,
    open_image_files,
    open_picture,
    readable,
)
from evalkit.system.files import kind_of, replace_atomically
from evalkit.system.identity import check_unchanged, recall

__all__ = [
    "VALUE_RANGES",
    "ImageSource",
    "NpzWriter",
    "SupportsArray",
    "ValueRange",
    "are_ids",
    "check_range_used",
    "is_pattern",
    "open_images",
    "parse_value_range",
    "read_ahead",
]

T = TypeVar("T")

ValueRange: TypeAlias = str | tuple[float, float]
"""A key of :data:`VALUE_RANGES`, or the two numbers that it stands for."""

VALUE_RANGES: Mapping[str, tuple[float, float]] = {"0..1": (0, 1), "-1..1": (-1, 1), "0..255": (0, 255)}
"""What black and white are in files of floats."""

# No picture of 8 bits is as dark as floats that are scaled for a network, which seldom pass 4 either way; nor
# is one of integers whose values are all 0, 1 or 2, as such floats become where they are cut to integers.
_DARK_BATCH, _DARK_IMAGE = 16.0, 2.0
_CUT = {0, 1, 2, 254, 255}  # negative ones wrap around
_MOST_NOTES = 8
_SAY = 'say so with --value-range {0} where the command has it (in Python value_range="{0}")'
_LOOK_AT_ONCE = 16
_DECODING_THREADS = min(8, os.cpu_count() or 1)
_STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
_PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))
# Keys of an npz that evalkit itself writes beside the images.
_OUR_KEYS = {"provenance", "indices"}


class SupportsArray(Protocol):
    """Anything NumPy can turn into an array, such as a torch tensor on the CPU."""

    def __array__(self) -> NDArray[Any]: ...


class ImageSource(ABC):
    """A sequence of equally large RGB images, in a fixed order, read in batches.

    A new kind of source implements ``_read``, ``_paths`` and, where hashing every pixel would be a waste,
    ``_examine``.

    Attributes:
        name: The path as it was given, or ``"<array>"``.
        kind: ``"npz"``, ``"npy"``, ``"folder"``, ``"zip"``, ``"tar"``, ``"parquet"``, ``"hdf5"``, ``"array"``
            or, of several files, ``"parts"``.
        shape: ``(height, width, 3)`` of every image; None where there are statistics and no images.
        dtype: ``uint8``, or ``float32`` for files that hold floats (in [0, 255] all the same).
        value_range: What was said of the floats of the file, which become [0, 255]; None where nothing was,
            or where it holds integers.
        labels: ``(n,)`` int64, one class an image (npz ``arr_1``, HDF5 ``labels`` or ``arr_1``), or None.
        labels_problem: Why ``labels`` is None although the file has some; None where it has none.
        statistics: ``mu`` (2048,) and ``sigma`` (2048, 2048), ``mu_s`` (2023,) and ``sigma_s`` (2023, 2023)
            of the reference evaluator, both pairs or one, finite floats as the file holds them; or None.
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
        self.value_range: tuple[float, float] | None = None
        self.labels: NDArray[np.int64] | None = None
        self.labels_problem: str | None = None
        self.statistics: Mapping[str, NDArray[Any]] | None = None
        self.provenance: Mapping[str, Any] | None = None
        self.notes: tuple[str, ...] = ()
        self._count = count
        self._stored_dtype = dtype
        self._found: Mapping[str, Any] | None = None
        self._stamp: str | None = None

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}: {len(self)} images of shape {self.shape}, {self.dtype}>"

    @property
    def digest(self) -> str:
        """Hex sha256 of the content: what :meth:`identify` gives."""
        return self.identify()

    def identify(self, progress: Callable[[int, int], None] | None = None) -> str:
        """Hash the content: all pixels, in their order.

        The type, shape and values of arrays count, whatever container they are in; of image files their
        bytes. The whole file is read, and its checksums compared, unless it was before and has not changed
        since (see :mod:`evalkit.system.identity`): what a file says of itself decides nothing.

        Args:
            progress: Called with (images done, images in all) where the file is read.

        Returns:
            Hex sha256.

        Raises:
            ImageError: The header of an image is bad.
            InputError: The container is damaged, or changed while it was read.
        """
        if self._found is not None:
            self.check_unchanged()
        else:
            examine, paths = partial(self._examine, progress), self._paths()
            if paths is None:
                self._found = examine()
            else:
                with readable(self.name):
                    self._found, self._stamp = recall(Path(self.name), self.kind, lambda: paths, examine)
        found = str(self._found["digest"])
        if self.value_range in (None, VALUE_RANGES["0..255"]):
            return found
        return hashlib.sha256(f"{found} in {self.value_range}".encode()).hexdigest()

    def check_unchanged(self, *, every_file: bool = False) -> None:
        """Raise an InputError if files are not as they were when their content was hashed.

        Args:
            every_file: Of a folder look at all files, and not only where there is a single one.
        """
        paths = self._paths()
        if self._stamp is not None and paths is not None and (every_file or len(paths) == 1):
            check_unchanged(self.name, self._stamp, paths)

    @property
    def statistics_digest(self) -> str | None:
        """Hex sha256 of the statistics that the file has; None where it has none."""
        return None if self.statistics is None else _statistics_digest(self.statistics)

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

    def _paths(self) -> Sequence[Path] | None:
        """The files that decide the content; None where it is not that of files alone."""
        return None

    def _examine(self, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
        """Reads everything once: ``digest``; of floats also what tells which range they are in."""
        dtype = self._stored_dtype.newbyteorder("<")
        digest = hashlib.sha256(f"array {dtype.str} {(len(self), *(self.shape or ()))}\n".encode())
        floats = _Floats()
        done = 0
        for batch in self._read(_LOOK_AT_ONCE, 0):
            digest.update(np.ascontiguousarray(batch, dtype).data)
            if dtype.kind == "f":
                floats.look(batch)
            done += len(batch)
            if progress:
                progress(done, len(self))
        return {"digest": digest.hexdigest()} | (floats.found() if dtype.kind == "f" else {})

    def _checked(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        first = start
        low, high = self.value_range or VALUE_RANGES["0..255"]
        for batch in self._read(size, start):
            if batch.dtype != np.uint8:
                outside = ~((batch >= low) & (batch <= high))  # NaN compares false, so it is outside too
                if outside.any():
                    index = first + int(outside.reshape(len(batch), -1).any(axis=1).argmax())
                    raise ImageError(
                        f"{self.name}: image {index} (counted from 0) holds the value {batch[outside][0]}; "
                        f"expected finite numbers from {low:g} to {high:g}. If it only overshoots, as after "
                        f"a resize, cut it off with x.clip({low:g}, {high:g})"
                    )
            batch = batch.astype(self.dtype, copy=False)
            if (low, high) == VALUE_RANGES["0..1"]:
                batch *= np.float32(255)
            elif (low, high) == VALUE_RANGES["-1..1"]:
                batch = (batch + np.float32(1)) * np.float32(127.5)
            yield batch
            first += len(batch)

    def _take_labels(
        self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], load: Callable[[], NDArray[Any]]
    ) -> None:
        """Keeps one integer an image; anything else is only noted, as the metrics do without labels."""
        problem = _labels_problem(len(self), key, shape, dtype)
        if problem is None:
            labels = load()
            if dtype.kind == "u" and labels.max(initial=0) > np.iinfo(np.int64).max:
                problem = f"{labels.max()} in {key} does not fit into a signed 64-bit integer"
            else:
                self.labels = labels.astype(np.int64)
        if problem is not None:
            self.labels_problem = f"The labels are left out: {problem}."
            self.notes += (self.labels_problem,)

    def _judge(self, value_range: tuple[float, float] | None) -> None:
        """Refuses what cannot be pixels in [0, 255], which would all be taken for black."""
        if self.dtype == np.float32 and self.shape:
            self.notes += ("The pixels are floats; they are used as they are, not rounded to 8 bits.",)
            self.value_range = value_range
            self.identify()
            assert self._found is not None
            _judge_floats(self, self._found)
        elif self.shape and value_range != VALUE_RANGES["0..255"]:
            self._judge_integers()

    def _judge_integers(self) -> None:
        """Looks at images until one has values that floats cut to integers do not have."""
        values: set[int] = set()
        try:
            for size, start in ((1, 0), (_LOOK_AT_ONCE, 1)):
                for batch in self._read(size, start) if start < len(self) else ():
                    values |= {*np.unique(batch).tolist()}
                    if not values <= _CUT:
                        return
        except InputError:
            return  # it is told where images are read for their own sake
        if values - {0, 255}:
            raise InputError(
                f"{self.name}: no value but {', '.join(map(str, sorted(values)))}; expected pixels from 0 "
                "to 255. Floats in [0, 1] or [-1, 1] that were converted to integers look like this: scale "
                f"them first. If the images are meant to be so, {_SAY.format('0..255')}"
            )


def _labels_problem(count: int, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
    """Why an array of this shape and type is not one class for each of ``count`` images."""
    if shape == (count,) and dtype.kind in "ui":
        return None
    text = f"expected {count} integers, found {dtype} {shape} in {key}"
    if len(shape) == 2 and shape[0] == count:
        if shape[1] == 1:
            return f"{text}, a column; make it a row with labels.reshape(-1)"
        return f"{text}, one-hot it seems; turn it into classes with labels.argmax(axis=1)"
    if shape == (count,) and dtype.kind == "f":
        return f"{text}; turn it into classes with labels.astype(int)"
    return text


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def check_range_used(opened: Iterable[_Named], value_range: ValueRange | None) -> None:
    """Refuse a range of floats that was given where there are none.

    Args:
        opened: Images, files or features.
        value_range: As it was given to open them.

    Raises:
        InputError: None of them holds floats.
    """
    opened = list(opened)
    scaled = value_range is not None and parse_value_range(value_range) != VALUE_RANGES["0..255"]
    if scaled and all(getattr(one, "dtype", None) != np.float32 for one in opened):
        raise InputError(
            f"Value range {value_range!r} applies only to floats, and there are none in "
            f"{listing(one.name for one in opened)}. Integers are always from 0 to 255: leave it out."
        )


def are_ids(labels: NDArray[np.int64]) -> bool:
    """Whether labels are no classes but seeds or ids: numbers that are thinly spread over a vast range.

    Args:
        labels: (n,).
    """
    if not len(labels):
        return False
    classes = len(np.unique(labels))
    # Python's integers: the range may be larger than 64 bits hold.
    span = int(labels.max()) - min(int(labels.min()), 0)
    return classes > 1 and span > max(100_000, 1000 * classes)


class _Floats:
    """What tells the range of floats, gathered while they stream past."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.images = self.dark = 0
        self.first_dark = 0

    def look(self, batch: NDArray[Any]) -> None:
        flat = batch.reshape(len(batch), -1)
        lows, highs = flat.min(axis=1), flat.max(axis=1)
        self.low, self.high = min(self.low, float(lows.min())), max(self.high, float(highs.max()))
        dark = (lows >= -_DARK_IMAGE) & (highs <= _DARK_IMAGE) & ((lows != 0) | (highs != 0))
        if dark.any() and not self.dark:
            self.first_dark = self.images + int(dark.argmax())
        self.dark += int(dark.sum())
        self.images += len(batch)

    def found(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "dark": self.dark, "first_dark": self.first_dark}


def _judge_floats(images: ImageSource, found: Mapping[str, Any]) -> None:
    """Raises an InputError for floats that are, all or some of them, scaled for a network."""
    low, high, dark = found["low"], found["high"], found["dark"]
    if images.value_range is not None:
        if images.value_range == VALUE_RANGES["-1..1"] and low >= 0:
            images.notes += (
                f"No value of {images.name} is below 0, although its range is said to be -1..1.",
            )
        return
    if -_DARK_BATCH < low <= high < _DARK_BATCH and (low, high) != (0, 0):
        range_, convert = ("0..1", "x * 255") if low >= -0.5 else ("-1..1", "(x + 1) * 127.5")
        shown = range_.replace("..", ", ")
        raise InputError(
            f"{images.name}: holds floats from {low:.3g} to {high:.3g}, scaled to [{shown}] it seems; "
            f"expected [0, 255]. If they are, {_SAY.format(range_)}, or convert them with "
            f"({convert}).round().clip(0, 255).astype(np.uint8). Latents, and images normalised by mean and "
            "deviation, are not pixels: decode them, or undo the normalisation, first"
        )
    if dark and dark < len(images) and high <= 255:
        raise InputError(
            f"{images.name}: {dark:,} of {len(images):,} images hold floats between {-_DARK_IMAGE:g} and "
            f"{_DARK_IMAGE:g} alone, the first being image {found['first_dark']} (counted from 0), and "
            f"others up to {high:.3g}: some are scaled for a network, it seems. Bring all to [0, 255]; if "
            f"they are this dark, {_SAY.format('0..255')}"
        )


def open_images(
    source: str | os.PathLike[str] | SupportsArray, *, value_range: ValueRange | None = None
) -> ImageSource:
    """Opens images, whatever they are kept in; the kind is told from the content, not from the suffix.

    - npz: ``arr_0`` as for the reference evaluator, with labels in ``arr_1`` and statistics if it has them.
      An npz with statistics and no images is a source of length 0. Several arrays of images are an error.
    - folder, zip, tar (also compressed): image files (png, jpg, webp, bmp, tif, ppm) at any depth, in the
      order of their relative POSIX paths. Hidden files are left out. Pillow decodes them to RGB; as in other
      tools, EXIF orientation is not applied and of several frames the first counts. Nothing is extracted.
    - parquet, one file or a folder of them: a column of encoded images, with labels in ``label``.
    - HDF5: the dataset ``images`` or ``arr_0``, or the only one with four axes.
    - npy and arrays, also torch tensors on the CPU.
    - Several of these as one: a pattern such as ``parts/*.npz``, in the order of their sorted names
      (``10`` before ``9``). All of one size, without statistics; labels where all have them.

    Arrays are ``(n, height, width, 3)``, integers or floats, in [0, 255]. Floats are all looked at, once (see
    :meth:`ImageSource.identify`): a batch, or an image of it, that is scaled for a network is refused, unless
    ``value_range`` says how.

    Args:
        source: A path or an array.
        value_range: What floats hold: ``"0..1"``, ``"-1..1"`` or ``"0..255"``. The first two are brought to
            [0, 255], not rounded; values outside are an error. Integers are from 0 to 255 in any case.

    Raises:
        ImageError: The first image file is bad.
        InputError: The file is missing, is none of the above, is damaged, has no images, or they have the
            wrong shape, type or range; or its statistics are incomplete or not finite.
    """
    wanted = parse_value_range(value_range)
    if not isinstance(source, str | os.PathLike):
        images = _open_array(source)
    elif not os.fspath(source):
        raise InputError("A path is empty. Give a file, a folder or a pattern; . is the current folder.")
    elif is_pattern(source):
        return _open_parts(str(Path(source)), value_range)
    else:
        images = _open_path(Path(source))
    images._judge(wanted)
    return images


def parse_value_range(value: ValueRange | None) -> tuple[float, float] | None:
    """The two numbers that a range stands for.

    Raises:
        InputError: It is none of :data:`VALUE_RANGES`.
    """
    if value is None:
        return None
    for key, pair in VALUE_RANGES.items():
        if isinstance(value, str | tuple | list) and (value == key or tuple(value) == pair):
            return pair
    raise InputError(f"Value range {value!r}: expected one of {', '.join(VALUE_RANGES)}.")


def _open_path(path: Path) -> ImageSource:
    head = b""
    with readable(str(path)):
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder")
        if not (path.is_dir() or path.is_file()):
            raise InputError(f"{path}: is no ordinary file; expected a file or a folder")
        if not path.is_dir():
            with path.open("rb") as file:
                head = file.read(64)
            if head.startswith(b"PK"):
                _refuse_pytorch(path)
                if _holds_arrays(path):
                    return _Npz(path)
            if head.startswith(b"\x93NUMPY"):
                return _Npy(path)
            if h5py.is_hdf5(path):
                return _Hdf5(path)
        if files := open_image_files(path):
            return _Decoded(files)
    raise InputError(
        f"{path}: its content (first bytes {head[:8]!r}) is that of no known container; it is "
        f"{kind_of(head)}; expected an npz, npy, zip, tar, parquet or HDF5 file or a folder of images"
    )


def _refuse_pytorch(path: Path) -> None:
    """PyTorch's files are zips of a pickle and raw numbers, none of which is ever loaded."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        raise InputError(
            f"{path}: is a PyTorch file, as torch.save writes it: a pickle, which could run code and is "
            "never loaded. Save the images with np.savez(path, x.cpu().numpy()), as (n, height, width, 3) "
            "uint8"
        )


def is_pattern(source: str | os.PathLike[str]) -> bool:
    """Whether this is no path of anything, but a pattern of paths: with ``*``, ``?``, ``[...]`` or ``**``."""
    try:
        return glob.has_magic(os.fspath(source)) and not Path(source).exists()
    except OSError:  # a name that is too long, a folder that is not ours
        return False


def _open_parts(pattern: str, value_range: ValueRange | None) -> ImageSource:
    paths = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes none from the root
    if "[" in pattern:
        # Brackets in the name of a folder, rather than a choice of characters.
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
    return _Parts(pattern, [open_images(path, value_range=value_range) for path in paths])


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


class _Array(ImageSource):
    """An array in memory."""

    def __init__(self, array: NDArray[Any]) -> None:
        shape = _check_layout("<array>", array.shape, array.dtype)
        super().__init__("<array>", "array", len(array), shape, array.dtype)
        self._array = array

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        for first in range(start, len(self), size):
            yield np.array(self._array[first : first + size], order="C")  # a copy: consumers may write


class _Npy(ImageSource):
    """An array in a file of its own.

    It is read and not mapped, because a file that shrinks under a map ends the process. What is hashed is not
    remembered: a program that writes through a map changes no time of the file.
    """

    def __init__(self, path: Path) -> None:
        name = str(path)
        with path.open("rb") as file:
            header = _read_npy_header(name, file, path.stat().st_size)
        shape = _check_layout(name, header.shape, header.dtype)
        super().__init__(name, "npy", header.shape[0], shape, header.dtype)
        self._header = header

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        header = self._header
        with readable(self.name), Path(self.name).open("rb") as file:
            if header.fortran:
                array = np.load(file, allow_pickle=False)
                for first in range(start, len(self), size):
                    yield np.array(array[first : first + size], order="C")
                return
            file.seek(header.length + start * math.prod(header.shape[1:]) * header.dtype.itemsize)
            for first in range(start, len(self), size):
                batch = np.empty((min(size, len(self) - first), *header.shape[1:]), header.dtype)
                _fill(file, batch)
                yield batch


def _open_array(source: SupportsArray) -> ImageSource:
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
    return _Array(array)


class _NpyHeader(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    length: int


def _read_npy_header(name: str, file: IO[bytes], size: int, *, objects: bool = False) -> _NpyHeader:
    """Reads the header of an npy file of ``size`` bytes and checks it before anything is allocated.

    Pickled ``objects`` are refused, unless the array is only to be told of.
    """
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
    if dtype.hasobject and objects:
        return _NpyHeader(shape, dtype, fortran, file.tell())
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


class _Npz(ImageSource):
    """The reference evaluator's format: arrays in a zip, streamed out of it."""

    def __init__(self, path: Path) -> None:
        name = str(path)
        with readable(name), zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            for member in members:
                check_member_name(name, member)
            notes = check_zip(name, archive)
            keys = [member.removesuffix(".npy") for member in members if member.endswith(".npy")]
            statistics = _read_statistics(name, archive, keys)
            used = {*_OUR_KEYS, *(statistics or {})}
            if "arr_0" in keys:
                header = _npz_header(name, archive, "arr_0")
                shape = _check_layout(f"{name}, arr_0", header.shape, header.dtype)
                super().__init__(name, "npz", header.shape[0], shape, header.dtype)
                self._header = header
                others = {
                    key: _npz_layout(name, archive, key) for key in dict.fromkeys(keys) if key not in used
                }
                _check_only_images(name, others)
                if "arr_1" in keys:
                    labels = _npz_header(name, archive, "arr_1")
                    self._take_labels(
                        "arr_1", labels.shape, labels.dtype, lambda: _npz_array(archive, "arr_1", labels)
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
            notes += (_one_pair(name, statistics, bool(self.shape)),)
        self.notes += notes
        if self.shape and self._header.fortran:
            self.notes += ("The array is in Fortran order, so it is loaded into memory whole.",)

    def _paths(self) -> Sequence[Path]:
        return [Path(self.name)]

    def _examine(self, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
        if self.shape:
            return super()._examine(progress)
        return {"digest": _statistics_digest(self.statistics or {})}

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


def _statistics_digest(statistics: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(b"statistics\n")
    for key, array in statistics.items():
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


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


def _npz_header(name: str, archive: zipfile.ZipFile, key: str, *, objects: bool = False) -> _NpyHeader:
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as stream:
        return _read_npy_header(f"{name}, {key}", stream, info.file_size, objects=objects)


def _npz_layout(name: str, archive: zipfile.ZipFile, key: str) -> _Layout:
    """Type and shape of an array that may not be used."""
    try:
        header = _npz_header(name, archive, key, objects=True)
    except InputError:
        return _Layout("damaged", ())
    return _Layout(str(header.dtype), header.shape)


class _Layout(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    @property
    def is_of_images(self) -> bool:
        return len(self.shape) == 4 and self.shape[-1] == 3

    @property
    def may_be_of_images(self) -> bool:
        return len(self.shape) >= 4


def _check_only_images(name: str, arrays: Mapping[str, _Layout]) -> None:
    """Refuses several arrays of images, of which one alone would be measured."""
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


def _one_pair(name: str, statistics: Mapping[str, Any], images: bool) -> str:
    (missing, which), (there, of) = (("mu_s", "sFID"), ("mu", "FID"))
    if "mu" not in statistics:
        (missing, which), (there, of) = (there, of), (missing, which)
    pair = " and ".join(key for key in _STATISTICS if key in statistics)
    rest = f"{which} uses its images" if images else f"there is no {missing} for {which}"
    return (
        f"{name} has {pair} alone: {of} uses these, {rest}. Other tools also write mu and "
        f"sigma, but from images resized in another way: {of} is comparable only if the file was made for "
        "this protocol."
    )


def _npz_array(archive: zipfile.ZipFile, key: str, header: _NpyHeader) -> NDArray[Any]:
    array = np.empty(math.prod(header.shape), header.dtype)
    with archive.open(f"{key}.npy") as stream:
        stream.read(header.length)
        _fill(stream, array)
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def _read_statistics(name: str, archive: zipfile.ZipFile, keys: list[str]) -> dict[str, NDArray[Any]] | None:
    present = [key for key in _STATISTICS if key in keys]
    missing = [key for pair in _PAIRS if set(pair) & set(present) for key in pair if key not in present]
    if missing:
        raise InputError(
            f"{name}: has {', '.join(present)} without {', '.join(missing)}; expected mu and sigma, mu_s and "
            f"sigma_s, or all of {', '.join(_STATISTICS)}"
        )
    statistics = {}
    for key in present:
        shape, header = _STATISTICS[key], _npz_header(name, archive, key)
        if header.shape != shape or header.dtype.kind != "f":
            raise InputError(
                f"{name}: {key} is {header.dtype} of shape {header.shape}; expected floats of shape {shape}"
            )
        array = _npz_array(archive, key, header)
        if not np.isfinite(array).all():
            raise InputError(f"{name}: {key} holds values that are not finite; compute the statistics again")
        statistics[key] = array.astype(header.dtype.newbyteorder("="))
    return statistics or None


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
            for key in ("images", "arr_0", "labels", "arr_1"):
                # By way of links, too, which visititems leaves aside.
                if key not in datasets and isinstance(file.get(key), h5py.Dataset):
                    datasets[key] = file[key]
            with_four_axes = [key for key, dataset in datasets.items() if dataset.ndim == 4]
            named = [key for key in ("images", "arr_0") if key in datasets]
            if not named and len(with_four_axes) != 1:
                found = listing(f"{key} {dataset.shape}" for key, dataset in datasets.items()) or "none"
                raise InputError(
                    f"{name}: which dataset holds the images? "
                    f"Expected images, arr_0 or only one with four axes; found {found}"
                )
            self._key = (named or with_four_axes)[0]
            numbered = {key: _Layout(str(d.dtype), d.shape or ()) for key, d in datasets.items()}
            _check_only_images(
                name, {key: d for key, d in numbered.items() if re.fullmatch(r"arr_[0-9]+", key)}
            )
            dataset = datasets[self._key]
            shape = _check_layout(f"{name}, {self._key}", dataset.shape or (), dataset.dtype)
            super().__init__(name, "hdf5", len(dataset), shape, dataset.dtype)
            _check_written(f"{name}, {self._key}", dataset)
            labels = next((key for key in ("labels", "arr_1") if key in datasets), None)
            if labels is not None:
                found = datasets[labels]
                self._take_labels(labels, found.shape or (), found.dtype, lambda: found[:])
            unused = [
                f"{key} {found.shape}" for key, found in datasets.items() if key not in (self._key, labels)
            ]
            if unused:
                self.notes += (f"Datasets of {name} that are not used: {listing(unused)}.",)
            links = [
                key
                for key in file
                if key not in datasets and not isinstance(file.get(key, getlink=True), h5py.HardLink)
            ]
            if links:
                self.notes += (f"Links in {name} that are not followed: {listing(links)}.",)
            # The values may be in other files, whose changes would not be seen.
            own = Path(dataset.file.filename).samefile(path)
            self._is_whole = own and not (dataset.is_virtual or dataset.external)

    def _paths(self) -> Sequence[Path] | None:
        return [Path(self.name)] if self._is_whole else None

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        with readable(self.name), h5py.File(self.name, "r") as file:
            dataset = file[self._key]
            for first in range(start, len(self), size):
                yield dataset[first : first + size]


def _check_written(where: str, dataset: Any) -> None:
    """Raise an InputError for a dataset of which parts were never written: they would read as black."""
    folder = Path(dataset.file.filename).parent
    if dataset.is_virtual:
        files = {source.file_name for source in dataset.virtual_sources()} - {"."}
        if missing := [file for file in sorted(files) if not (folder / file).exists()]:
            raise InputError(f"{where}: its values are in other files that are not there: {listing(missing)}")
    for file, offset, size in dataset.external or ():
        there = (folder / file).stat().st_size if (folder / file).exists() else 0
        if there < offset + min(size, dataset.nbytes):
            raise InputError(f"{where}: its values are in {file}, which is not there or too short")
    if dataset.chunks is not None:
        chunks = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        if (written := dataset.id.get_num_chunks()) < chunks:
            raise InputError(
                f"{where}: {written:,} of its {chunks:,} chunks were written; the rest would count as "
                "black. The program that wrote it did not finish"
            )


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
            self.labels_problem = f"The labels are left out: {len(labels)} of {len(parts)} parts have them."
            self.notes += (self.labels_problem,)
        self.value_range = None  # the parts have applied theirs
        notes = Counter(note.replace(part.name, "a part") for part in parts for note in part.notes)
        for note, count in notes.most_common(_MOST_NOTES):
            self.notes += (f"{note} (So in {count} of {len(parts)} parts of {name}.)",)
        if len(notes) > _MOST_NOTES:
            self.notes += (f"{len(notes) - _MOST_NOTES:,} more notes on parts of {name} are not shown.",)

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

    def _examine(self, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
        content, done = [], 0
        for part in self._parts:
            content.append((len(part), part.digest))
            done += len(part)
            if progress:
                progress(done, len(self))
        digests = Counter(digest for _, digest in content)
        if again := [part.name for part in self._parts if digests[part.digest] > 1]:
            self.notes += (f"Some parts of {self.name} hold the same images: {listing(again)}.",)
        return {"digest": hashlib.sha256(f"parts {content}".encode()).hexdigest()}

    def check_unchanged(self, *, every_file: bool = False) -> None:
        for part in self._parts:
            part.check_unchanged(every_file=every_file)


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
        self.labels, self.labels_problem = files.labels, files.labels_problem
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
            with open_picture(data) as image:
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

    def _look(self, name: str, data: bytes) -> bool:
        """Finds at the beginning what would else end the work after hours; whether there are more frames."""
        with self._opened(name, data) as image:
            return bool(getattr(image, "is_animated", False))

    def _paths(self) -> Sequence[Path]:
        return self._files.paths()

    def _examine(self, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
        done = animated = 0

        def look(name: str, data: bytes) -> None:
            nonlocal done, animated
            animated += self._look(name, data)
            done += 1
            if progress:
                progress(done, len(self))

        return {"digest": self._files.digest(look), "animated": animated}

    def identify(self, progress: Callable[[int, int], None] | None = None) -> str:
        known = self._found is not None
        digest = super().identify(progress)
        if not known and (animated := (self._found or {}).get("animated")):
            self.notes += (
                f"{animated:,} images of {self.name} have several frames, of which the first counts.",
            )
        return digest
