"""A sequence of images of one size, read in batches and known by a hash of its content."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import ImageError, InputError
from evalkit.images.labels import labels_problem
from evalkit.images.reading import readable
from evalkit.images.value_range import (
    VALUE_RANGES,
    FloatStatistics,
    are_cut_floats,
    cut_floats_problem,
    scaled_floats_problem,
)
from evalkit.system.background import Background, Task, read_ahead
from evalkit.system.identity import check_unchanged, recall, stamp
from evalkit.system.progress import Progress
from evalkit.system.stops import check_stop
from evalkit.system.storage import Place, Remote

__all__ = ["ImageSource", "Known"]


class Known(NamedTuple):
    """What one process tells another of a source.

    Attributes:
        found: What reading the content gave: ``digest`` and others.
        stamp: Of the files then; None if their content is not all that decides.
        value_range: See :class:`ImageSource`.
    """

    found: Mapping[str, Any]
    stamp: str | None
    value_range: tuple[float, float] | None


_BATCH_SIZE = 16
"""Images at a time where the whole source is read to examine it."""


class ImageSource(ABC):
    """A sequence of equally large RGB images, in a fixed order, read in batches.

    A subclass implements ``_read`` and ``_paths``, and ``_examine`` if hashing every pixel would be wasteful.

    Attributes:
        name: The path as given, or ``"<array>"``.
        kind: A key of :data:`evalkit.images.FORMATS`, such as ``"npz"``; or ``"array"``, or ``"parts"`` for
            several files.
        shape: ``(height, width, 3)`` of every image; None if there are only statistics.
        dtype: ``uint8``, or ``float32`` for files of floats (converted to [0, 255]).
        value_range: The range that the user declared for floats in the file, which are mapped to [0, 255];
            None if no range was declared, or if the file has integers.
        labels: ``(n,)`` int64, the class of each image (npz ``arr_1``, a parquet column, ...), or None.
        labels_problem: Why ``labels`` is None although the file has labels; None if it has none.
        statistics: ``mu`` (2048,) and ``sigma`` (2048, 2048), ``mu_s`` (2023,) and ``sigma_s`` (2023, 2023)
            of the reference evaluator, one or both pairs, as finite floats of the file's dtype; for EDM2 also
            ``mu_dinov2`` (1024,) and ``sigma_dinov2`` (1024, 1024); or None.
        provenance: How an npz written by evalkit was made, or None. For other tools' statistics, what is
            known, such as ``{"statistics": {"images": n}}`` for EDM2.
        notes: Notes for the user, one sentence each.
        published: Name of the published batch; empty for a user's own file.
        statistics_network: The network that ``mu`` and ``sigma`` are attributed to; see
            :func:`evalkit.comparison.networks.settle_statistics`.
        opened_by: Opens it again, in any process; None if it is pickled by value, as an array is.
        reads_in_order: Whether starting in the middle takes as long as reading everything before it.
        reads_in_pieces: Whether a few images are read at a time; False if all are loaded or unpacked first.

    It is pickled as a recipe for opening it again, with its digest; see :func:`evalkit.images.reopen`.
    """

    _remembered = True
    """Whether the hash is kept from run to run, as long as the files' sizes and times stay."""

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
        self.published = ""
        self.statistics_network = "inception"
        self.opened_by: Callable[[Known], ImageSource] | None = None
        self.reads_in_order = False
        self.reads_in_pieces = True
        self._count = count
        self._stored_dtype = dtype
        self._found: Mapping[str, Any] | None = None
        # Whether this process has read all of it, and compared its checksums.
        self._examined = False
        self._stamp: str | None = None
        self._ahead: Task[tuple[Mapping[str, Any], str | None]] | None = None

    def __len__(self) -> int:
        return self._count

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        if self.opened_by is None:
            return super().__reduce_ex__(protocol)
        self.identify()
        assert self._found is not None
        return self.opened_by, (Known(self._found, self._stamp, self.value_range),)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}: {len(self)} images of shape {self.shape}, {self.dtype}>"

    # ------------------------------------------------------------------------------------------- batches

    def batches(
        self, size: int, start: int = 0, stop: int | None = None
    ) -> Generator[NDArray[Any], None, None]:
        """Yield the images from ``start`` on, read ahead in a background thread.

        May be called any number of times. Closing the generator, or dropping it, ends its threads.

        Args:
            size: Batch size; the last batch may be smaller.
            start: Index of the first image.
            stop: No batch that begins here, or later, is read; None reads to the end.

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
        return read_ahead(self.checked_batches(size, start, stop))

    def checked_batches(self, size: int, start: int, stop: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield batches as :meth:`batches` does, but read them in this thread."""
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
            if stop is not None and first >= stop:
                return

    @abstractmethod
    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        """Yield batches as they are stored: any real dtype, values unchecked."""

    # ------------------------------------------------------------------------------------------ identity

    @property
    def digest(self) -> str:
        """Hex sha256 of the content, as :meth:`identify` returns it."""
        return self.identify()

    def identify(self, progress: Progress | None = None) -> str:
        """Hash the content: all pixels, in their order.

        For arrays the type, shape and values count, whatever container they are in; for image files their
        bytes. The whole file is read, and its checksums compared, unless it was read before and has not
        changed since (see :mod:`evalkit.system.identity`): what a file says about itself decides nothing.

        Args:
            progress: Called with (stage, images done, images in all) if the file is read.

        Returns:
            Hex sha256.

        Raises:
            ImageError: The header of an image is bad.
            InputError: The container is damaged, or changed while it was read.
        """
        if self._found is not None:
            self.check_unchanged()
        elif self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            found, self._stamp = ahead.result(progress)
            self.check_unchanged(every_file=True)  # files may have changed since they were hashed
            self._found = found
        else:
            self._found, self._stamp = self._hash(progress)
        digest = str(self._found["digest"])
        if self.value_range in (None, VALUE_RANGES["0..255"]):
            return digest
        return hashlib.sha256(f"{digest} in {self.value_range}".encode()).hexdigest()

    def _hash(self, progress: Progress | None) -> tuple[Mapping[str, Any], str | None]:
        """Result of examining the content, and the stamp of the files; None without files."""
        paths = self._paths()

        def examine() -> dict[str, Any]:
            found = self._examine(progress)
            self._examined = True
            return found

        if paths is None:
            return examine(), None
        place = paths[0] if isinstance(paths[0], Remote) else Path(self.name)
        with readable(self.name):
            return recall(place, self.kind, lambda: paths, examine, remember=self._remembered)

    def identify_ahead(self, background: Background) -> None:
        """Start to hash the content in the background. :meth:`identify` waits for it, and raises its errors.

        If :meth:`_can_hash_ahead` is False, :meth:`identify` computes the hash itself.
        """
        if self._found is None and self._ahead is None and self._can_hash_ahead():
            self._ahead = background.begin(self._hash)

    def _can_hash_ahead(self) -> bool:
        """Whether it consists of files on this machine that are read in pieces.

        Data loaded or unpacked as a whole would need memory or disk space at the same time as the current
        batch. Requests to a server would compete with those of the current batch, and requests from within
        h5py hold a lock that the store needs.
        """
        paths = self._paths()
        is_local = paths is not None and not any(isinstance(path, Remote) for path in paths)
        return is_local and self.reads_in_pieces

    def check_unchanged(self, *, every_file: bool = False) -> None:
        """Raise an InputError if files are not as they were when their content was hashed.

        Args:
            every_file: Check every file of a folder, and folders at URLs; otherwise only a source of one
                single file is checked.
        """
        paths = self._paths()
        if self._stamp is None or paths is None:
            return
        if every_file or (len(paths) == 1 and not (isinstance(paths[0], Remote) and paths[0].is_dir())):
            check_unchanged(self.name, self._stamp, paths)

    def shows_changes(self) -> bool:
        """Whether a change of the files since they were hashed would show; not on a server without versions.

        Where it would not, nothing that is read later may be kept under the hash.
        """
        return all(path.shows_changes() for path in self._paths() or () if isinstance(path, Remote))

    def take_known(self, known: Known) -> None:
        """Hash the content, unless the files are the very ones that were hashed, and compare.

        Raises:
            InputError: It is another content.
        """
        self.value_range = known.value_range
        paths = self._paths()
        if paths is not None and self.shows_changes():
            with readable(self.name):
                same = stamp(paths)[0] == known.stamp
            if same:
                self._found, self._stamp = known.found, known.stamp
                return
        self.identify()
        assert self._found is not None
        if self._found["digest"] != known.found["digest"]:
            raise InputError(
                f"{self.name} holds other images here, of the digest {self._found['digest'][:12]}, than for "
                f"the process that gives the work, of {known.found['digest'][:12]}"
            )

    @property
    def is_remote(self) -> bool:
        """Whether it is read from a URL."""
        paths = self._paths()
        return paths is not None and len(paths) == 1 and isinstance(paths[0], Remote)

    @property
    def statistics_digest(self) -> str | None:
        """Hex sha256 of the statistics in the file; None if it has none."""
        return None if self.statistics is None else self._hash_statistics()

    def _hash_statistics(self) -> str:
        digest = hashlib.sha256(b"statistics\n")
        for key, array in (self.statistics or {}).items():
            digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _paths(self) -> Sequence[Place] | None:
        """The files that decide the content; None if other things decide it, too."""
        return None

    def _examine(self, progress: Progress | None) -> dict[str, Any]:
        """Read everything once. The result has ``digest`` and, for floats, what tells their range."""
        if self.shape is None:
            return {"digest": self._hash_statistics()}
        dtype = self._stored_dtype.newbyteorder("<")
        digest = hashlib.sha256(f"array {dtype.str} {(len(self), *self.shape)}\n".encode())
        floats = FloatStatistics()
        done = 0
        self._report(progress, done)
        # Read ahead, because a container's own checksums take about as long as this one.
        with contextlib.closing(read_ahead(self._read(_BATCH_SIZE, 0), depth=1)) as batches:
            for batch in batches:
                digest.update(np.ascontiguousarray(batch, dtype).data)
                if dtype.kind == "f":
                    floats.update(batch)
                done += len(batch)
                self._report(progress, done)
        return {"digest": digest.hexdigest()} | (floats.found() if dtype.kind == "f" else {})

    def _report(self, progress: Progress | None, done: int) -> None:
        check_stop()
        if progress:
            progress(f"checksum of the images of {self.name}", done, len(self))

    # -------------------------------------------------------------------------------- labels and values

    def _take_labels(
        self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], load: Callable[[], NDArray[Any]]
    ) -> None:
        """Keep one integer for each image; anything else is only noted, as few metrics need labels."""
        problem = labels_problem(len(self), key, shape, dtype)
        if problem is None:
            labels = load()
            if dtype.kind == "u" and labels.max(initial=0) > np.iinfo(np.int64).max:
                problem = f"{labels.max()} in {key} does not fit into a signed 64-bit integer"
            else:
                self.labels = labels.astype(np.int64)
        if problem is not None:
            self.labels_problem = f"The labels are left out: {problem}."
            self.notes += (self.labels_problem,)

    def take_value_range(self, value_range: tuple[float, float] | None) -> None:
        """Set the range of floats, and refuse values that cannot be pixels; they would all be black.

        Floats are all read, once (see :meth:`identify`); integers until an image has values that scaled
        floats do not have where they are cut to integers.

        Args:
            value_range: What the floats hold; None if the user did not say.

        Raises:
            InputError: The values look scaled for a network.
        """
        if self.dtype == np.float32 and self.shape:
            self.notes += ("The pixels are floats; they are used as they are, not rounded to 8 bits.",)
            self.value_range = value_range
            self.identify()
            assert self._found is not None
            if value_range is None:
                if problem := scaled_floats_problem(self.name, len(self), self._found):
                    raise InputError(problem)
            elif value_range == VALUE_RANGES["-1..1"] and self._found["low"] >= 0:
                self.notes += (
                    f"No value of {self.name} is below 0, although its range is said to be -1..1.",
                )
        elif self.shape and value_range != VALUE_RANGES["0..255"]:
            self._check_integers()

    def _check_integers(self) -> None:
        values: set[int] = set()
        try:
            for size, start in ((1, 0), (_BATCH_SIZE, 1)):
                for batch in self._read(size, start) if start < len(self) else ():
                    values |= {*np.unique(batch).tolist()}
                    if not are_cut_floats(values):
                        return
        except InputError:
            return  # it is reported where the images are read for their own sake
        if problem := cut_floats_problem(self.name, values):
            raise InputError(problem)
