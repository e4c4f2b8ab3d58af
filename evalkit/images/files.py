"""Image files as they come, of any size and colour mode: the base of their containers, and folders of them.

Containers are listed when they are opened and read member by member; nothing is extracted to disk, and no
member's bytes are decoded here. :mod:`evalkit.images.decode` decodes those that all have one size.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, RemoteError, listing
from evalkit.images.names import duplicates_note, is_image, kinds_of, no_images, split_of, splits_note
from evalkit.images.reading import MAX_IMAGE_BYTES, Candidate, check_size, readable
from evalkit.system.ranges import fetch_each
from evalkit.system.storage import Place, Remote, listed, place_of

__all__ = [
    "DATASET",
    "Folder",
    "ImageFiles",
    "Members",
    "list_folder",
    "walk_names",
]

DATASET = PurePosixPath("dataset.json")
"""Where the datasets of EDM and StyleGAN keep their labels."""


class ImageFiles(ABC):
    """Encoded images, of any size and colour mode, in the order of their names.

    They are pickled as their location and a digest of their names and sizes. Another process opens them
    again, and raises an error if they differ. A subclass sets ``_path``.

    Attributes:
        name: The path as it was given.
        kind: The row of :data:`evalkit.images.FORMATS`, such as ``"zip"``.
        names: Relative POSIX path of each image; in a parquet file its file and row.
        labels: ``(n,)`` int64 if the container has them (``dataset.json``, a column), or None.
        labels_problem: Why ``labels`` is None although the container has some; None if it has none.
        notes: Notes for the user, one sentence each.
        reads_in_order: Whether starting in the middle takes as long as reading everything before it.
        reads_in_pieces: Whether images are read one at a time; False if all are unpacked first.
    """

    _path: Place
    reads_in_order = False
    reads_in_pieces = True

    def __init__(self, name: str, kind: str, names: list[str]) -> None:
        self.name = name
        self.kind = kind
        self.names = names
        self.labels: NDArray[np.int64] | None = None
        self.labels_problem: str | None = None
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, indices: Iterable[int]) -> Generator[tuple[str, bytes | InputError], None, None]:
        """Yield the name and content of these images, given by ascending index.

        If an image cannot be read, the error that says so comes in place of its content.

        Raises:
            InputError: The container itself cannot be read.
        """

    @abstractmethod
    def paths(self) -> Sequence[Place]:
        """The files that hold the images; of a folder at a URL the folder."""

    def __reduce__(self) -> tuple[Callable[..., ImageFiles], tuple[Any, ...]]:
        place = self._path.url if isinstance(self._path, Remote) else os.path.abspath(self._path)  # noqa: PTH100
        return _open_again, (type(self), place, self.name, self._listing())

    def _listing(self) -> str:
        """Hex sha256 over names and versions, which is the same wherever the same files are seen."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        if isinstance(self._path, Remote) and not self._path.is_dir():
            digest.update(self._path.stamp()[0].encode())
        for version in self._versions():
            digest.update(f"\n{version}".encode())
        return digest.hexdigest()

    @abstractmethod
    def _versions(self) -> Iterable[object]:
        """What tells other files of the same names, the same on all hosts: sizes, or what a listing says."""

    def leave_labels_out(self, problem: str) -> None:
        """Note why existing labels are not used."""
        self.labels_problem = problem
        self.notes += (problem,)

    def digest(self, look: Callable[[str, bytes], object]) -> str:
        """Hex sha256 over the contents in order.

        Args:
            look: Called with the name and content of every image; its errors are passed on.
        """
        digest = hashlib.sha256(b"image files\n")
        for name, data in self.read(range(len(self))):
            if isinstance(data, InputError):
                raise data
            look(name, data)
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


def _open_again(kind: Callable[[Place], ImageFiles], place: str, name: str, expected: str) -> ImageFiles:
    """The images of another process.

    Raises:
        InputError: They are not there, or others are.
    """
    path = place_of(place)
    if isinstance(path, Path) and not path.exists():
        raise InputError(f"{path}: there is no such file or folder here. Give a path that all hosts share.")
    with readable(str(path)):
        found = kind(path)
        if found._listing() != expected:
            raise InputError(
                f"{path}: has other names or sizes here than where the work was given out. Give a path that "
                "all hosts share, and change nothing there meanwhile."
            )
    found.name = name  # as it was given, so that messages are the same everywhere
    return found


class Members(ImageFiles):
    """Image files that their container lists by name, such as a folder, a zip or a tar.

    A subclass lists its members, sets ``_path``, and implements ``_open`` and ``_size``. It may override
    ``_take_labels``, if labels are not in ``dataset.json``; ``_in_order``, if images come in another order
    than that of their paths; and ``_take_repeated``, if members of the same name are an error.
    """

    def __init__(
        self, name: str, kind: str, members: Iterable[tuple[str, Any]], notes: tuple[str, ...] = ()
    ) -> None:
        found: dict[PurePosixPath, Any] = {}
        again, backslashes = [], 0
        for path, value in members:
            # Archives of .NET and PowerShell 5, and files unpacked from them, have backslashes between
            # folders.
            member = PurePosixPath(path.replace("\\", "/"))
            backslashes += "\\" in path
            if member in found:
                again.append(path)
            found[member] = value
        images = self._in_order({str(member): value for member, value in found.items() if is_image(member)})
        others = {member: value for member, value in found.items() if not is_image(member)}
        if not images:
            raise InputError(no_images(name, kind, others.keys() - {DATASET}, notes))
        super().__init__(name, kind, list(images))
        self._members = list(images.values())
        self.notes += notes
        used = self._take_labels(others)
        if left_out := kinds_of(others.keys() - used):
            self.notes += (f"Files that are not images are left out: {left_out}.",)
        self._take_repeated(again)
        if backslashes:
            self.notes += (
                f"{backslashes:,} names in {name} contain backslashes; they are read as the / between "
                "folders.",
            )
        folders = Counter(split_of(name.split("/")[:-1]) for name in self.names)
        if note := splits_note(name, folders, "images"):
            self.notes += (note,)

    def _in_order(self, images: Mapping[str, Any]) -> Mapping[str, Any]:
        """The images, by path, in the order in which they are read: that of their paths."""
        return dict(sorted(images.items()))

    def _take_repeated(self, names: list[str]) -> None:
        """Note which images have the name of an earlier member; the last of a name is used.

        Args:
            names: The members whose name came before, images or not, as the container spells them.
        """
        if images := [name for name in names if is_image(PurePosixPath(name.replace("\\", "/")))]:
            self.notes += (duplicates_note(self.name, images),)

    def _take_labels(self, others: Mapping[PurePosixPath, Any]) -> Set[PurePosixPath]:
        """Set the labels, from ``dataset.json`` as EDM and StyleGAN have it; a subclass may read others.

        Args:
            others: The members that are not images, by path.

        Returns:
            Those that were read, so that no note says that they are left out.
        """
        if DATASET not in others:
            return set()
        with readable(self.name), self._open() as read:
            labels = self._read_dataset(read, others[DATASET])
        if labels is None:
            self.leave_labels_out(f"{DATASET} is left out: expected one integer label for each image.")
        self.labels = labels
        return {DATASET}

    def _read_dataset(self, read: Callable[[Any], bytes], member: Any) -> NDArray[np.int64] | None:
        """Labels of ``{"labels": [["a/b.png", 3], ...]}``, one for each image; None if they are not that."""
        try:
            if self._size(member) > MAX_IMAGE_BYTES:
                return None
            labels = dict(json.loads(read(member))["labels"])
            found = np.array([labels[name] for name in self.names])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return found.astype(np.int64) if found.shape == (len(self),) and found.dtype.kind == "i" else None

    @abstractmethod
    def _open(self) -> AbstractContextManager[Callable[[Any], bytes]]:
        """Open the container; the value is the function that reads a member."""

    @abstractmethod
    def _size(self, member: Any) -> int:
        """The member's size in bytes, uncompressed."""

    def _versions(self) -> Iterable[object]:
        return map(self._size, self._members)

    def paths(self) -> Sequence[Place]:
        """The container itself."""
        return [self._path]

    def read(self, indices: Iterable[int]) -> Generator[tuple[str, bytes | InputError], None, None]:
        """Yield the name and content of these images; see :meth:`ImageFiles.read`."""
        with readable(self.name), self._open() as read:
            yield from self._contents(partial(self._content, read), indices)

    def _contents(
        self, content: Callable[[int], tuple[str, bytes | InputError]], indices: Iterable[int]
    ) -> Generator[tuple[str, bytes | InputError], None, None]:
        for index in indices:
            yield content(index)

    def _content(self, read: Callable[[Any], bytes], index: int) -> tuple[str, bytes | InputError]:
        """Name and content of an image; a server that fails is an error of the whole container."""
        name, member = self.names[index], self._members[index]
        try:
            with readable(f"{self.name}, {name}"):
                check_size(f"{self.name}, {name}", self._size(member))
                return name, read(member)
        except RemoteError:
            raise
        except InputError as error:
            return name, error


class Folder(Members):
    """A folder, searched at every depth; folders that are links are not entered."""

    def __init__(self, path: Place) -> None:
        self._path = path
        members: Iterable[tuple[str, str | Remote]]
        notes: tuple[str, ...] = ()
        if isinstance(path, Remote):
            members = path.walk().items()
        else:
            files, notes = list_folder(path)
            members = ((file, file) for file in files)
        super().__init__(str(path), "folder", members, notes)

    @classmethod
    def claims(cls, candidate: Candidate) -> bool:
        """Whether it is a folder."""
        return candidate.is_folder

    def paths(self) -> Sequence[Place]:
        """The image files; see :meth:`ImageFiles.paths`."""
        if isinstance(self._path, Remote):
            return [self._path]
        return [Path(self._path, member) for member in self._members]

    def _versions(self) -> Iterable[object]:
        if isinstance(self._path, Remote):
            return listed(dict(zip(self.names, self._members, strict=True)))
        return super()._versions()

    @contextmanager
    def _open(self) -> Iterator[Callable[[str | Remote], bytes]]:
        yield lambda member: self._place(member).read_bytes()

    def _place(self, member: str | Remote) -> Place:
        return member if isinstance(member, Remote) else Path(str(self._path), member)

    def _contents(
        self, content: Callable[[int], tuple[str, bytes | InputError]], indices: Iterable[int]
    ) -> Generator[tuple[str, bytes | InputError], None, None]:
        if isinstance(self._path, Remote):  # many at a time, because each has to be asked for
            yield from fetch_each(content, indices, size=lambda index: self._size(self._members[index]))
        else:
            yield from super()._contents(content, indices)

    def _size(self, member: str | Remote) -> int:
        if isinstance(member, Remote):
            return member.size
        found = Path(str(self._path), member).stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{self.name}, {member}: is not a regular file")
        return found.st_size


def list_folder(path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Relative POSIX paths of all files in a folder, at every depth, and notes on links to folders."""
    found: list[str] = []
    links: list[Path] = []
    with readable(str(path)):
        for folder, folders, files in os.walk(path, onerror=_raise):
            found += [(Path(folder) / file).relative_to(path).as_posix() for file in files]
            links += [link for f in folders if (link := Path(folder) / f).is_symlink()]
    if not links:
        return found, ()
    note = (
        f"Folders that are links are not entered: {listing(sorted(links))}. Give the folders they lead "
        "to, or copies."
    )
    return found, (note,)


def walk_names(path: Path) -> Iterator[PurePosixPath]:
    """Yield the relative paths of all files in a folder, at every depth, one folder after the other."""
    for folder, _, files in os.walk(path, onerror=_raise):
        for file in files:
            yield PurePosixPath((Path(folder) / file).relative_to(path).as_posix())


def _raise(error: OSError) -> None:
    raise error
