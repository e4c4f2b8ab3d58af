"""A folder that any number of workers fill with samples, and whose work survives the death of any of them.

::

    runs/x/manifest.json                    what decides the samples; a run with other settings is refused
    runs/x/claims.lock                      locks: which worker makes which shard
    runs/x/shards/000012.npz                samples 12 * shard_size and on; complete, or absent
    runs/x/samples_50000x256x256x3.npz      all samples, once every shard is there; shards are then removed

A worker claims a shard by locking a byte of ``claims.lock``. The kernel releases the lock when the process
ends, however it ends, also on a folder shared with other hosts; nothing is left to clean up. These are POSIX
record locks (``fcntl.lockf``) and not ``flock``: a process that a worker forks does not inherit them, and so
cannot keep a shard claimed after the worker's death. On a system without such locks (Windows) only one
process can work on a run.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, OutputError, brief
from evalkit.images import NpzWriter
from evalkit.system.differences import differences
from evalkit.system.files import replace_atomically
from evalkit.system.locks import HAS_CLAIMS, claim
from evalkit.system.space import check_free_space

__all__ = ["FORMAT", "Shard", "ShardFolder", "check_disk"]

FORMAT = "evalkit samples 2"

# Bytes of the lock file past those of any shard.
_MERGING, _MANIFEST = 2**40, 2**40 + 1
# What NumPy and zipfile raise for damaged bytes.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


class Shard(NamedTuple):
    """Samples ``begin`` to ``end - 1`` of a run."""

    number: int
    begin: int
    end: int


def check_disk(root: Path, need: int) -> None:
    """Refuse a run that the disk cannot hold, before memory is taken for each of its samples.

    Args:
        root: The run's folder. Where it exists, samples in it are counted when it is opened; only what the
            whole disk could not hold is refused now.
        need: Bytes of all samples.

    Raises:
        OutputError: There is not enough space.
    """
    there = next((folder for folder in (root, *root.absolute().parents) if folder.is_dir()), None)
    if there == root:
        usage = shutil.disk_usage(there)
        _check_space(root, there, need, usage.total - usage.free)
    elif there is not None:
        _check_space(root, there, 2 * need)


def _check_space(root: Path, folder: Path, need: int, reusable: int = 0) -> None:
    what = f"The run {root}, for its shards and the file that joins them,"
    remedy = "Free some space, or give a folder on another disk."
    check_free_space(folder, need, what, remedy, reusable=reusable)


class ShardFolder:
    """The folder of a run, as one process sees it; made by :meth:`open`.

    Attributes:
        final: The npz with all samples.
        shards: Every shard of the run.
        notes: How ``made_with`` differs from when the folder was begun.
        shareable: Whether other workers may join, which needs file locks.
    """

    def __init__(
        self,
        root: Path,
        locks: IO[bytes],
        identity: Mapping[str, Any],
        shape: tuple[int, int, int, int],
        shard_size: int,
    ):
        self.root = root
        self.shape = shape
        self.final = root / f"samples_{'x'.join(map(str, shape))}.npz"
        begins = range(0, shape[0], shard_size)
        self.shards = [
            Shard(number, begin, min(begin + shard_size, shape[0])) for number, begin in enumerate(begins)
        ]
        self.notes: tuple[str, ...] = ()
        self.shareable = HAS_CLAIMS
        self._identity = {"format": FORMAT, **identity}
        self._folder = root / "shards"
        self._locks = locks

    @classmethod
    @contextmanager
    def open(
        cls,
        root: Path,
        *,
        identity: Mapping[str, Any],
        made_with: Mapping[str, Any],
        shape: tuple[int, int, int, int],
        shard_size: int,
    ) -> Iterator[Self]:
        """Begin a folder or join it. Once in a process at a time: closing it releases every lock.

        Args:
            root: The folder; made if need be, in an existing parent.
            identity: What decides the samples, as JSON holds it.
            made_with: What may differ between workers, such as versions.
            shape: ``(n, height, width, 3)`` of all samples together.
            shard_size: Samples a shard.

        Raises:
            InputError: The folder holds samples of other settings, or of another version of evalkit.
            OutputError: It cannot be written, or has not enough space for the samples.
        """
        try:
            root.mkdir(exist_ok=True)
            locks = (root / "claims.lock").open("ab")
        except OSError as error:
            raise OutputError(
                f"Cannot write in the folder {root}: {error.strerror or error}. "
                "Its parent must exist and be writable."
            ) from error
        with locks:
            folder = cls(root, locks, identity, shape, shard_size)
            with folder._lock(_MANIFEST, wait=True):
                folder._agree(made_with)
                folder._folder.mkdir(exist_ok=True)
            folder._check_space()
            yield folder

    # ------------------------------------------------------------------------------------- making shards

    def missing(self) -> list[Shard]:
        """The shards that are still to be made; none where the final file exists."""
        # Folders are listed, because a network file system may claim for a minute that a new file does not
        # exist; and in this order, because shards are removed only after the final file has appeared.
        try:
            there = set(self._folder.iterdir())
        except FileNotFoundError:
            there = set()
        if self.final in self.root.iterdir():
            return []
        return [shard for shard in self.shards if self._path(shard) not in there]

    def claims(self, rank: int = 0, workers: int = 1) -> Generator[Shard | None, None, None]:
        """Yields, until none is missing, a shard that this worker has claimed; the next call releases it.

        Yields None where other workers have claimed all that are missing. Wait and ask again: they may die.

        Args:
            rank: Rank of this worker, of those that start together; each begins at another shard.
            workers: How many these are.

        Raises:
            OutputError: There are several, and the system has no locks.
        """
        if workers > 1 and not HAS_CLAIMS:
            raise OutputError(
                f"{workers} workers cannot share {self.root}: this system has no file locks. Start only one."
            )
        while missing := self.missing():
            start = len(missing) * (rank % workers) // workers
            idle = True
            for shard in missing[start:] + missing[:start]:
                with self._lock(shard.number) as mine:
                    if mine and shard in self.missing():
                        idle = False
                        yield shard
            if idle:
                yield None

    def save(self, shard: Shard, images: NDArray[np.uint8], made_with: Mapping[str, Any]) -> None:
        """Write a claimed shard, atomically.

        Args:
            shard: The claim.
            images: ``(end - begin, height, width, 3)``.
            made_with: What the final file records of how they were made.

        Raises:
            OutputError: It cannot be written.
        """
        path, note = self._path(shard), json.dumps(made_with, sort_keys=True)
        _remove_partials(path)
        with replace_atomically(path) as partial, partial.open("wb") as file:
            np.savez(file, images=images, made_with=note, sha256=_digest(images, note))

    def load(self, shard: Shard) -> tuple[NDArray[np.uint8], str] | None:
        """The images of a shard, and its ``made_with`` as JSON; None where it is missing or damaged."""
        try:
            with self._path(shard).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                images, note, digest = arrays["images"], str(arrays["made_with"]), str(arrays["sha256"])
        except _DAMAGE:
            return None
        whole = images.shape == (shard.end - shard.begin, *self.shape[1:])
        return (images, note) if whole and digest == _digest(images, note) else None

    # ------------------------------------------------------------------------------------------- merging

    def merge(self, labels: NDArray[np.int64] | None) -> bool:
        """Join the shards into the final file, one in memory at a time, and remove them.

        Waits while another worker joins them.

        Args:
            labels: ``(n,)``, written as ``arr_1``; or None.

        Returns:
            False if shards are missing or were damaged. The damaged ones are removed, to be made again.

        Raises:
            OutputError: The file cannot be written.
        """
        with self._lock(_MERGING, wait=True):
            if self.final not in self.root.iterdir():
                _remove_partials(self.final)
                try:
                    self._write_final(labels)
                except _DamagedShardError:
                    self._remove_damaged()
                    return False
            shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def _write_final(self, labels: NDArray[np.int64] | None) -> None:
        notes: set[str] = set()
        with NpzWriter.create(self.final, self.shape) as writer:
            for shard in self.shards:
                loaded = self.load(shard)
                if loaded is None:
                    raise _DamagedShardError
                writer.append(loaded[0])
                notes.add(loaded[1])
            if labels is not None:
                writer.add("arr_1", labels)
            provenance = {**self._identity, "made_with": [json.loads(note) for note in sorted(notes)]}
            writer.add("provenance", np.array(json.dumps(provenance)))

    def _remove_damaged(self) -> None:
        for shard in self.shards:
            if self.load(shard) is None:
                self._path(shard).unlink(missing_ok=True)

    # --------------------------------------------------------------------------------- manifest and locks

    def _agree(self, made_with: Mapping[str, Any]) -> None:
        """Begin the folder, or check that it was begun for the same samples."""
        path = self.root / "manifest.json"
        ours = json.loads(json.dumps({**self._identity, "begun_with": made_with}))
        if not path.exists():
            if self.final.exists() or any(self._folder.glob("*.npz")):
                raise InputError(f"{self.root} holds samples and no manifest.json. Give another folder.")
            _remove_partials(path)
            with replace_atomically(path) as partial:
                partial.write_text(json.dumps(ours, indent=2) + "\n")
            return
        try:
            theirs: dict[str, Any] = dict(json.loads(path.read_text()))
            begun_with = dict(theirs.pop("begun_with", {}))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({error}). Give another folder for this run.") from error
        now = ours.pop("begun_with")
        if theirs.get("format") != FORMAT:
            raise InputError(
                f"{self.root} was begun by another version of evalkit: its format is "
                f"{brief(theirs.get('format'))!r}, and this one writes {FORMAT!r}. Finish it with that "
                "version, or give another folder."
            )
        if changed := differences(theirs, ours):
            raise InputError(
                f"{self.root} holds samples of other settings: {'; '.join(changed)}. "
                "Give the same settings to resume the run, or another folder."
            )
        self.notes = tuple(differences(begun_with, now))

    def _check_space(self) -> None:
        if self.final.exists():
            return
        images = self.shape[0] + sum(shard.end - shard.begin for shard in self.missing())
        # The unfinished file of a worker that was killed is replaced.
        reusable = sum(partial.stat().st_size for partial in _partials(self.final))
        _check_space(self.root, self.root, images * math.prod(self.shape[1:]), reusable)

    def _lock(self, byte: int, *, wait: bool = False) -> AbstractContextManager[bool]:
        """Whether this process holds ``byte`` of the lock file while the block runs."""
        return claim(self._locks, byte, "Give a folder on another one, or mount it with locks.", wait=wait)

    def _path(self, shard: Shard) -> Path:
        return self._folder / f"{shard.number:06d}.npz"


class _DamagedShardError(Exception):
    """Stops the writing of the final file."""


def _digest(images: NDArray[np.uint8], note: str) -> str:
    digest = hashlib.sha256(f"{images.dtype.str} {images.shape} {note}\n".encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def _remove_partials(path: Path) -> None:
    """Remove what killed workers left of ``path``; only with its lock held."""
    for partial in _partials(path):
        partial.unlink(missing_ok=True)


def _partials(path: Path) -> list[Path]:
    """Under the names that :func:`replace_atomically` gives them."""
    return list(path.parent.glob(f".{path.name}.*.partial"))
