"""A folder that fills with samples, whose work survives the death of any process.

::

    runs/x/manifest.json                    what decides the samples; a run with other settings is refused
    runs/x/lock                             held by the one process that writes
    runs/x/shards/000012.npz                samples 12 * shard_size and on, a shard; complete, or absent
    runs/x/shards/000012_16-32.npz          those from 16 to 31 of that shard, where its batches are smaller
    runs/x/samples_50000x256x256x3.npz      all samples, once they are there; the shards are then removed

Batches end where shards end, so that the batch size alone decides which samples are computed together.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, OutputError, brief
from evalkit.images import NpzWriter
from evalkit.system.differences import differences
from evalkit.system.files import replace_atomically
from evalkit.system.locks import exclusive_lock
from evalkit.system.space import check_free_space

__all__ = ["FORMAT", "Piece", "ShardFolder", "check_disk", "check_space"]

FORMAT = "evalkit samples 2"

_NAME = re.compile(r"(\d{6,})(?:_(\d+)-(\d+))?\.npz")
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


class Piece(NamedTuple):
    """Samples ``begin`` to ``end - 1`` of a run, which are in one file."""

    begin: int
    end: int


def check_disk(root: Path, need: int) -> None:
    """Refuse a run that the disk cannot hold, before memory is taken for each of its samples.

    Args:
        root: The run's folder. Where it exists, :func:`check_space` counts what is in it; only what the whole
            disk could not hold is refused now.
        need: Bytes of all samples.

    Raises:
        OutputError: There is not enough space.
    """
    there = next((folder for folder in (root, *root.absolute().parents) if folder.is_dir()), None)
    if there == root:
        usage = shutil.disk_usage(there)
        _check_space([root], there, need, usage.total - usage.free)
    elif there is not None:
        _check_space([root], there, 2 * need)


def check_space(folders: Sequence[ShardFolder]) -> None:
    """Refuse runs that the disk cannot hold: all missing samples, and the file that joins those of one run.

    Raises:
        OutputError: There is not enough space.
    """
    unfinished = [folder for folder in folders if not folder.final.exists()]
    if unfinished:
        missing = sum(
            (end - begin) * folder.bytes_of_one
            for folder in unfinished
            for begin, end in folder.missing(folder.shard_size)
        )
        final = max(folder.shape[0] * folder.bytes_of_one for folder in unfinished)
        _check_space([folder.root for folder in unfinished], unfinished[0].root, missing + final)


def _check_space(runs: Sequence[Path], folder: Path, need: int, reusable: int = 0) -> None:
    others = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    check_free_space(
        folder,
        need,
        f"The run {runs[0]}{others}, for its shards and the file that joins them,",
        "Free some space, or give a folder on another disk.",
        reusable=reusable,
    )


class ShardFolder:
    """The folder of a run; made by :meth:`open`.

    Attributes:
        final: The npz with all samples.
        notes: How ``made_with`` differs from when the folder was begun.
    """

    def __init__(
        self, root: Path, identity: Mapping[str, Any], shape: tuple[int, int, int, int], shard_size: int
    ):
        self.root = root
        self.shape = shape
        self.shard_size = shard_size
        self.final = root / f"samples_{'x'.join(map(str, shape))}.npz"
        self.notes: tuple[str, ...] = ()
        self._identity = {"format": FORMAT, **identity}
        self._folder = root / "shards"
        # Where the stored pieces begin and end.
        self._ends: dict[int, int] = {}

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
        """Begin a folder or go on with it, and keep all other processes out.

        Args:
            root: The folder; made if need be, in an existing parent.
            identity: What decides the samples, as JSON holds it.
            made_with: What may change when the run is resumed, such as versions.
            shape: ``(n, height, width, 3)`` of all samples together.
            shard_size: Samples a shard.

        Raises:
            InputError: The folder holds samples of other settings, or of another version of evalkit.
            OutputError: Another process samples into it, or it cannot be written.
        """
        folder = cls(root, identity, shape, shard_size)
        try:
            root.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"Cannot write in the folder {root}: {error.strerror or error}. "
                "Its parent must exist and be writable."
            ) from error
        with exclusive_lock(
            root / "lock",
            f"sampling into {root}",
            advice="Wait for it or stop it, or give another folder. For many GPUs, start one command with "
            "--engine ray.",
        ):
            folder._agree(made_with)
            folder._folder.mkdir(exist_ok=True)
            folder._look()
            yield folder

    @property
    def bytes_of_one(self) -> int:
        """Bytes of a sample."""
        return math.prod(self.shape[1:])

    # ------------------------------------------------------------------------------------- making samples

    def missing(self, batch_size: int) -> list[Piece]:
        """What is still to be made, in order; nothing where the final file exists.

        Args:
            batch_size: Most samples a piece.
        """
        if self.final.exists():
            return []
        return [piece for piece in self._pieces(batch_size) if piece.begin not in self._ends]

    def save(self, piece: Piece, images: NDArray[np.uint8], made_with: Mapping[str, Any]) -> None:
        """Write a piece, atomically.

        Args:
            piece: One of :meth:`missing`.
            images: ``(end - begin, height, width, 3)``.
            made_with: What the final file records of how they were made.

        Raises:
            OutputError: It cannot be written.
        """
        note = json.dumps(made_with, sort_keys=True)
        with replace_atomically(self._path(piece)) as partial, partial.open("wb") as file:
            np.savez(file, images=images, made_with=note, sha256=_digest(images, note))
        self._ends[piece.begin] = piece.end

    def load(self, piece: Piece) -> tuple[NDArray[np.uint8], str] | None:
        """The images of a piece, and its ``made_with`` as JSON; None where it is missing or damaged."""
        try:
            with self._path(piece).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                images, note, digest = arrays["images"], str(arrays["made_with"]), str(arrays["sha256"])
        except _DAMAGE:
            return None
        whole = images.shape == (piece.end - piece.begin, *self.shape[1:])
        return (images, note) if whole and digest == _digest(images, note) else None

    def _pieces(self, batch_size: int) -> Iterator[Piece]:
        """All pieces in order: as they are stored, and the others as batches of this size cut them."""
        count, size, begin = self.shape[0], self.shard_size, 0
        while begin < count:
            shard_end = min(begin - begin % size + size, count)
            end = self._ends.get(begin) or min(begin + batch_size, shard_end)
            yield Piece(begin, end)
            begin = end

    def _path(self, piece: Piece) -> Path:
        number, first = divmod(piece.begin, self.shard_size)
        length = piece.end - piece.begin
        is_shard = first == 0 and length == min(self.shard_size, self.shape[0] - piece.begin)
        part = "" if is_shard else f"_{first}-{first + length}"
        return self._folder / f"{number:06d}{part}.npz"

    def _look(self) -> None:
        """Remove what killed processes left unfinished, and note which pieces are there."""
        for folder in (self.root, self._folder):
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        self._ends.clear()
        for path in self._folder.iterdir():
            if not (found := _NAME.fullmatch(path.name)):
                continue
            shard = int(found[1]) * self.shard_size
            shard_end = min(shard + self.shard_size, self.shape[0])
            begin, end = (
                (shard, shard_end) if found[2] is None else (shard + int(found[2]), shard + int(found[3]))
            )
            # Where batches of several sizes begin at the same sample, the largest is used.
            if shard <= begin < end <= shard_end:
                self._ends[begin] = max(end, self._ends.get(begin, 0))

    # ------------------------------------------------------------------------------------------- merging

    def merge(self, labels: NDArray[np.int64] | None) -> bool:
        """Join all pieces into the final file, one in memory at a time, and remove them.

        Args:
            labels: ``(n,)``, written as ``arr_1``; or None.

        Returns:
            False if some are missing or were damaged. The damaged ones are removed, to be made again.

        Raises:
            OutputError: The file cannot be written.
        """
        if not self.final.exists():
            try:
                self._write_final(labels)
            except _DamagedError:
                self._remove_damaged()
                return False
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def _write_final(self, labels: NDArray[np.int64] | None) -> None:
        notes: set[str] = set()
        with NpzWriter.create(self.final, self.shape) as writer:
            for piece in self._pieces(self.shard_size):
                loaded = self.load(piece)
                if loaded is None:
                    raise _DamagedError
                writer.append(loaded[0])
                notes.add(loaded[1])
            if labels is not None:
                writer.add("arr_1", labels)
            provenance = {**self._identity, "made_with": [json.loads(note) for note in sorted(notes)]}
            writer.add("provenance", np.array(json.dumps(provenance)))

    def _remove_damaged(self) -> None:
        for piece in self._pieces(self.shard_size):
            if self.load(piece) is None:
                self._path(piece).unlink(missing_ok=True)
        self._look()

    # ------------------------------------------------------------------------------------------ beginning

    def _agree(self, made_with: Mapping[str, Any]) -> None:
        """Begin the folder, or check that it was begun for the same samples."""
        path = self.root / "manifest.json"
        ours = json.loads(json.dumps({**self._identity, "begun_with": made_with}))
        if not path.exists():
            if self.final.exists() or any(self._folder.glob("*.npz")):
                raise InputError(f"{self.root} holds samples and no manifest.json. Give another folder.")
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


class _DamagedError(Exception):
    """Stops the writing of the final file."""


def _digest(images: NDArray[np.uint8], note: str) -> str:
    digest = hashlib.sha256(f"{images.dtype.str} {images.shape} {note}\n".encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()
