"""Files of images as they come, of any size and colour mode: in folders, zips, tars and parquet files.

Containers are listed when they are opened and read member by member; nothing is extracted to disk, and no
member's bytes are decoded here. :mod:`evalkit.images` decodes them where they all have one size.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from evalkit.errors import ImageError, InputError, MissingDependencyError, OutputError, listing
from evalkit.system.files import kind_of

__all__ = [
    "DATASET",
    "DECODERS",
    "MAX_IMAGE_BYTES",
    "READ_ERRORS",
    "ImageFiles",
    "check_member_name",
    "check_zip",
    "first_folders",
    "is_image",
    "open_image_files",
    "open_picture",
    "readable",
]

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
DECODERS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Naming the decoders keeps Pillow's many others (some start external programs) away from untrusted files."""

DATASET = PurePosixPath("dataset.json")
"""Where the datasets of EDM and StyleGAN keep their labels."""

MAX_IMAGE_BYTES = 2**28
"""One image, encoded or decoded; as RGB it is Pillow's limit against decompression bombs, 89 megapixels."""

_TABLES = {".parquet", ".pq"}
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
"""Words by which data sets name their splits, in folders and in files of the hub."""

# Chunks of a PNG that hold no pixels. Pillow unpacks them, and refuses an image with a megabyte of text.
_PNG_TEXT = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}

# What readers raise: RuntimeError is zipfile's answer to encryption, KeyError one of h5py's to damage.
READ_ERRORS = (
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    UnicodeError,  # names in the directory of a zip
    NotImplementedError,  # what zipfile knows of and cannot read
)


class ImageFiles(ABC):
    """Encoded images in the order of their names.

    Attributes:
        name: The path as it was given.
        kind: ``"folder"``, ``"zip"``, ``"tar"`` or ``"parquet"``.
        names: Relative POSIX path of each image; in a parquet file its file and row.
        labels: ``(n,)`` int64 where the container has them (``dataset.json``, a column), or None.
        labels_problem: Why ``labels`` is None although the container has some; None where it has none.
        notes: What the user should know and that is no error, a sentence each.
    """

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
        """Yields the name and content of these images, given by ascending index.

        In place of the content of one that cannot be read comes the error that says so.

        Raises:
            InputError: The container itself cannot be read.
        """

    @abstractmethod
    def sizes(self) -> list[int]:
        """Size of each image in bytes, encoded; one of a whole file's where single ones are not known."""

    @abstractmethod
    def paths(self) -> list[Path]:
        """The files on disk that hold the images."""

    def leave_labels_out(self, problem: str) -> None:
        """Note why labels that are there are not used."""
        self.labels_problem = problem
        self.notes += (problem,)

    def digest(self, look: Callable[[str, bytes], object]) -> str:
        """Hex sha256 over the contents in order.

        Args:
            look: Given the name and content of every image that is read for it; what it raises comes out.
        """
        digest = hashlib.sha256(b"image files\n")
        for name, data in self.read(range(len(self))):
            if isinstance(data, InputError):
                raise data
            look(name, data)
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


def open_image_files(path: Path) -> ImageFiles | None:
    """Opens a folder, zip, tar or parquet file of images; None where ``path`` is none of these.

    Files ending in png, jpg, webp, bmp, tif or ppm count, at any depth; hidden ones do not. A folder of
    parquet files is read as one, in the order of their names.

    Raises:
        InputError: It is damaged, holds no images, or has members with unsafe paths.
        MissingDependencyError: Parquet needs pyarrow.
    """
    if path.is_dir():
        return _open_folder(path)
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        return _Zip(path)
    if head.startswith(b"PAR1"):
        return _Parquet(path, [path])
    if tarfile.is_tarfile(path):
        return _Tar(path)
    return None


def open_picture(data: bytes) -> Image.Image:
    """Pillow's image of an encoded file, its pixels not yet decoded; close it after use.

    Text and colour profiles of PNG files, which change no pixel, are not looked at.

    Raises:
        Exception: On damaged data, almost any.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        data = _without_text(data)
    try:
        return Image.open(io.BytesIO(data), formats=DECODERS)
    except UnidentifiedImageError as error:
        what = kind_of(data[:64])
        reason = error if "single" in what or "unknown" in what else f"it is {what}"
        raise ValueError(reason) from None


def _without_text(data: bytes) -> bytes:
    """A PNG without the chunks that are not needed for its pixels; as it is from where it is damaged."""
    kept, start, place = [], 0, 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            break
        if kind in _PNG_TEXT:
            kept.append(data[start:place])
            start = end
        place = end
    return b"".join([*kept, data[start:]]) if kept else data


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turns what the readers raise for damaged or unreadable files into an InputError."""
    try:
        yield
    except READ_ERRORS as error:
        raise InputError(
            f"{name}: cannot be read ({type(error).__name__}: {error}); "
            f"check that the file is complete and not protected, or copy it again"
        ) from error


def check_member_name(archive: str, name: str) -> None:
    """Refuses a path that would leave the archive.

    Raises:
        InputError: The path is absolute or has ``..`` in it.
    """
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        raise InputError(f"{archive}: refused for its member {name!r}; expected relative paths without '..'")


def check_zip(name: str, archive: zipfile.ZipFile) -> tuple[str, ...]:
    """Notes on what of a zip its directory does not lead to.

    Raises:
        InputError: Another archive stands before this one, or the directory is damaged.
    """
    infos = archive.infolist()
    with Path(str(archive.filename)).open("rb") as file:
        start = file.read(4)
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _ZIP_END_BYTES))
        said, rest = _members_said(file.read())
    # Some writers of large archives keep the last 16 bits of the number alone.
    if (said - len(infos)) % 2**16:
        raise InputError(
            f"{name}: its directory lists {len(infos):,} members, and its end says that there are {said:,}; "
            "it is damaged, copy it again"
        )
    for info in infos:
        if "\0" in info.orig_filename or (info.filename.endswith("/") and info.file_size):
            raise InputError(f"{name}: {info.orig_filename!r} is no name of a file; the zip is damaged")
    first = min((info.header_offset for info in infos), default=0)
    if first > 0 and start == b"PK\x03\x04":
        raise InputError(
            f"{name}: it begins with {first:,} bytes of another zip, or of members that its directory does "
            "not list. Archives that were joined must be unpacked one by one"
        )
    again = [member for member, count in Counter(info.filename for info in infos).items() if count > 1]
    notes: tuple[str, ...] = (_duplicates(name, again),) if again else ()
    if rest:
        notes += (f"{name} goes on for {rest:,} bytes after its end, which are not used.",)
    return notes


# A comment of 65,535 bytes, the record of the end, and of 64-bit archives a second record and where it is.
_ZIP_END_BYTES = 65_535 + 22 + 20 + 56


def _members_said(end: bytes) -> tuple[int, int]:
    """The number of members that the last bytes of a zip announce, and how many bytes follow its end."""
    at = len(end) - 22
    if end[at : at + 4] != b"PK\5\6":
        at = end.rfind(b"PK\5\6")
    count, comment = struct.unpack_from("<H8xH", end, at + 10)
    if count == 0xFFFF and (large := end.rfind(b"PK\6\6", 0, at)) >= 0:
        (count,) = struct.unpack_from("<Q", end, large + 32)
    return int(count), max(0, len(end) - (at + 22 + comment))


def _duplicates(name: str, members: list[str]) -> str:
    return f"{name} has several members of the same name; only the last is used: {listing(members)}."


def is_image(name: PurePosixPath) -> bool:
    """Whether the suffix is that of an image and no part of the path is hidden."""
    return name.suffix.lower() in _SUFFIXES and not _is_hidden(name)


def _is_hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


class _Members(ImageFiles):
    """Image files that the container lists by name: of a folder, a zip or a tar."""

    def __init__(
        self, name: str, kind: str, members: Iterable[tuple[str, Any]], notes: tuple[str, ...] = ()
    ) -> None:
        found: dict[PurePosixPath, Any] = {}
        again, backslashes = [], 0
        for path, value in members:
            # Archives of .NET and PowerShell 5 have these between folders, and so do files unpacked from
            # them.
            member = PurePosixPath(path.replace("\\", "/"))
            backslashes += "\\" in path
            if member in found and is_image(member):
                again.append(path)
            found[member] = value
        left_out = Counter(
            "hidden" if _is_hidden(member) else member.suffix or "without suffix"
            for member in found
            if not is_image(member) and member != DATASET
        )
        others = listing(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
        images = sorted((str(member), value) for member, value in found.items() if is_image(member))
        if not images:
            packed = {".npz", ".npy", ".tar", ".zip", ".h5", ".hdf5"} & left_out.keys()
            advice = (
                f". For these give a pattern: '{name}/*{min(packed)}'" if kind == "folder" and packed else ""
            )
            raise InputError(
                f"{name}: no images; expected files ending in {', '.join(_SUFFIXES)}, "
                f"found {others or 'no files'}{advice}. {' '.join(notes)}".rstrip()
            )
        super().__init__(name, kind, [member for member, _ in images])
        self._members = [value for _, value in images]
        self.notes += notes
        if DATASET in found:
            with readable(name), self._open() as read:
                self._take_labels(read, found[DATASET])
        if others:
            self.notes += (f"Files that are not images are left out: {others}.",)
        if again:
            self.notes += (_duplicates(name, again),)
        if backslashes:
            self.notes += (
                f"In {backslashes:,} names of {name} there are backslashes; they are taken for the / "
                "between folders.",
            )
        folders = Counter(_split_of(name.split("/")[:-1]) for name in self.names)
        if note := _splits_note(name, folders, "images"):
            self.notes += (note,)

    def _take_labels(self, read: Callable[[Any], bytes], member: Any) -> None:
        """Labels as EDM's and StyleGAN's datasets hold them: ``{"labels": [["a/b.png", 3], ...]}``."""
        try:
            if self._size(member) > MAX_IMAGE_BYTES:
                raise ValueError
            labels = dict(json.loads(read(member))["labels"])
            found = np.array([labels[name] for name in self.names])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found = np.array(())
        if found.shape == (len(self),) and found.dtype.kind == "i":
            self.labels = found.astype(np.int64)
        else:
            self.leave_labels_out(f"{DATASET} is left out: it has not one integer label for each image.")

    @abstractmethod
    def _open(self) -> AbstractContextManager[Callable[[Any], bytes]]:
        """Opens the container and gives the function that reads a member."""

    @abstractmethod
    def _size(self, member: Any) -> int:
        """The member's size in bytes, uncompressed."""

    def paths(self) -> list[Path]:
        return [Path(self.name)]

    def sizes(self) -> list[int]:
        with readable(self.name):
            return [self._size(member) for member in self._members]

    def read(self, indices: Iterable[int]) -> Generator[tuple[str, bytes | InputError], None, None]:
        with readable(self.name), self._open() as read:
            for index in indices:
                name, member = self.names[index], self._members[index]
                content: bytes | InputError
                try:
                    with readable(f"{self.name}, {name}"):
                        _check_size(f"{self.name}, {name}", self._size(member))
                        content = read(member)
                except InputError as error:
                    content = error
                yield name, content


def _check_size(where: str, size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ImageError(f"{where}: {size} bytes; one image is limited to {MAX_IMAGE_BYTES}")


class _Folder(_Members):
    """A folder, searched at every depth; folders that are links are not entered."""

    def __init__(self, path: Path, files: Iterable[str], notes: tuple[str, ...]) -> None:
        super().__init__(str(path), "folder", ((file, file) for file in files), notes)

    def paths(self) -> list[Path]:
        return [Path(self.name, member) for member in self._members]

    @contextmanager
    def _open(self) -> Iterator[Callable[[str], bytes]]:
        yield lambda name: Path(self.name, name).read_bytes()

    def _size(self, member: str) -> int:
        found = Path(self.name, member).stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{self.name}, {member}: is no ordinary file")
        return found.st_size


def _open_folder(path: Path) -> ImageFiles:
    found: list[str] = []
    links: list[Path] = []
    with readable(str(path)):
        for folder, folders, files in os.walk(path, onerror=_raise):
            found += [(Path(folder) / file).relative_to(path).as_posix() for file in files]
            links += [link for f in folders if (link := Path(folder) / f).is_symlink()]
    notes: tuple[str, ...] = ()
    if links:
        notes = (
            f"Folders that are links are not entered: {listing(sorted(links))}. Give the folders they lead "
            "to, or copies.",
        )
    names = {file: PurePosixPath(file) for file in found}
    tables = sorted(
        file for file, name in names.items() if name.suffix.lower() in _TABLES and not _is_hidden(name)
    )
    if tables and not any(map(is_image, names.values())):
        if others := listing(sorted({*found} - {*tables})):
            notes += (f"Files that are not parquet are left out: {others}.",)
        return _Parquet(path, [path / file for file in tables], notes)
    return _Folder(path, found, notes)


def _raise(error: OSError) -> None:
    raise error


class _Zip(_Members):
    """A zip of image files."""

    def __init__(self, path: Path) -> None:
        name = str(path)
        with readable(name), zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
            notes = check_zip(name, archive)
        for info in infos:
            check_member_name(name, info.filename)
        super().__init__(name, "zip", ((info.filename, info) for info in infos), notes)

    @contextmanager
    def _open(self) -> Iterator[Callable[[zipfile.ZipInfo], bytes]]:
        with zipfile.ZipFile(self.name) as archive:
            yield archive.read

    def _size(self, member: zipfile.ZipInfo) -> int:
        return member.file_size


class _Tar(_Members):
    """A tar of image files, plain or compressed.

    A compressed one can only be read from its beginning to its end. Where that is not the order of its names,
    it is unpacked to a temporary file when it is first read.
    """

    def __init__(self, path: Path) -> None:
        name = str(path)
        members: list[tuple[str, tarfile.TarInfo]] = []
        others: list[str] = []
        with readable(name), tarfile.open(path) as tar:
            for info in tar:
                check_member_name(name, info.name)
                member = PurePosixPath(info.name)
                if is_image(member) and not info.isreg() and not info.isdir():
                    raise InputError(
                        f"{name}: its member {info.name} is a link or device; expected regular files. "
                        f"Write the archive again with tar --dereference --hard-dereference"
                    )
                if info.isreg():
                    members.append((info.name, info))
                elif not info.isdir():
                    others.append(info.name)
            self._unpacked_bytes = _check_end(name, tar, len(members))
            compressed = not isinstance(tar.fileobj, io.BufferedReader)
        self._unpacked: Path | None = None
        self._is_ordered = True
        notes = (f"Links and devices in {name} are not followed: {listing(others)}.",) if others else ()
        super().__init__(name, "tar", members, notes)
        offsets = [info.offset for info in self._members]
        if compressed and offsets != sorted(offsets):
            self._is_ordered = False
            self.notes += (
                f"{name} is compressed and not in the order of its names: it is unpacked to a temporary "
                f"file of {self._unpacked_bytes / 1e9:.2g} GB.",
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_unpacked": None}  # it goes with the object that made it

    @contextmanager
    def _open(self) -> Iterator[Callable[[tarfile.TarInfo], bytes]]:
        with tarfile.open(self.name if self._is_ordered else self._unpack()) as tar:

            def read(info: tarfile.TarInfo) -> bytes:
                file = tar.extractfile(info)
                assert file is not None  # only regular files are kept
                return file.read()

            yield read

    def _size(self, member: tarfile.TarInfo) -> int:
        return member.size

    def _unpack(self) -> Path:
        if self._unpacked is not None and self._unpacked.exists():
            return self._unpacked
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if self._unpacked_bytes > free:
            raise OutputError(
                f"{self.name} takes {self._unpacked_bytes / 1e9:.2f} GB unpacked, and "
                f"{tempfile.gettempdir()} has "
                f"{free / 1e9:.2f} GB free. Set TMPDIR to a folder with more, or write the archive again "
                "with tar --sort=name, in one folder."
            )
        with tempfile.NamedTemporaryFile(prefix="evalkit-", suffix=".tar", delete=False) as unpacked:
            weakref.finalize(self, _remove, unpacked.name)
            with tarfile.open(self.name) as tar:
                assert tar.fileobj is not None
                tar.fileobj.seek(0)
                while block := tar.fileobj.read(2**20):
                    unpacked.write(block)
        # Only now, so that another thread never meets a part of it.
        self._unpacked = Path(unpacked.name)
        return self._unpacked


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _check_end(name: str, tar: tarfile.TarFile, count: int) -> int:
    """Bytes of an archive whose members were all listed, unpacked.

    Raises:
        InputError: It was cut short, or something follows its end.
    """
    # tarfile takes an archive that was cut between two members for a complete one.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise InputError(f"{name}: has no end mark after {count} files; it was cut short, copy it again")
    while block := tar.fileobj.read(2**20):
        if block.strip(b"\0"):
            raise InputError(
                f"{name}: more data stands after the end of the archive, which has {count:,} files; "
                "archives that "
                "were joined with cat, it seems. Unpack it with tar --ignore-zeros, or join archives with "
                "tar --concatenate"
            )
    return tar.fileobj.tell()


class _Parquet(ImageFiles):
    """Rows of parquet files as the Hugging Face hub ships images: a column of ``{bytes, path}`` or bytes."""

    def __init__(self, path: Path, files: list[Path], notes: tuple[str, ...] = ()) -> None:
        self._files = files
        self._rows: list[int] = []
        labels: list[NDArray[np.int64]] = []
        problems: list[str] = []
        unused: set[str] = set()
        for file in files:
            with _parquet_file(file) as table:
                columns = table.schema_arrow.names
                self._column = _image_column(str(file), table.schema_arrow)
                self._rows.append(table.metadata.num_rows)
                unused |= {*columns} - {self._column, "label"}
                if "label" in columns:
                    column = table.read(["label"]).column("label")
                    if problem := _column_problem(column):
                        problems.append(problem)
                    else:
                        labels.append(column.to_numpy().astype(np.int64))
        names = [
            f"{file.relative_to(path).as_posix() if file != path else file.name}/{row:08d}"
            for file, rows in zip(files, self._rows, strict=True)
            for row in range(rows)
        ]
        if not names:
            raise InputError(f"{path}: its parquet files have no rows; expected at least one image")
        super().__init__(str(path), "parquet", names)
        self.notes += notes
        if sum(map(len, labels)) == len(names):
            self.labels = np.concatenate(labels)
        elif problems:
            self.leave_labels_out(f"The labels (column label) are left out: {problems[0]}.")
        elif labels:
            self.leave_labels_out(
                f"The labels are left out: {len(labels)} of {len(files)} files have a column label."
            )
        if unused:
            self.notes += (f"Columns of {path} that are not used: {listing(sorted(unused))}.",)
        splits: Counter[str] = Counter()
        for file, rows in zip(files, self._rows, strict=True):
            splits[_split_of((file.relative_to(path) if file != path else Path(file.name)).parts)] += rows
        if note := _splits_note(str(path), splits, "rows"):
            self.notes += (note,)

    def paths(self) -> list[Path]:
        return self._files

    def sizes(self) -> list[int]:
        with readable(self.name):
            return [
                file.stat().st_size
                for file, rows in zip(self._files, self._rows, strict=True)
                for _ in range(rows)
            ]

    def read(self, indices: Iterable[int]) -> Generator[tuple[str, bytes | InputError], None, None]:
        wanted = iter(indices)
        index = next(wanted, None)
        first = 0
        for file, rows in zip(self._files, self._rows, strict=True):
            if index is not None and index < first + rows:
                for row, value in self._rows_of(file, first):
                    if row == index:
                        yield self.names[row], self._content(self.names[row], value)
                        if (index := next(wanted, None)) is None:
                            return
                        if index >= first + rows:
                            break
            first += rows

    def _rows_of(self, file: Path, first: int) -> Iterator[tuple[int, Any]]:
        with _parquet_file(file) as table:
            for batch in table.iter_batches(16, columns=[self._column]):
                yield from enumerate(batch.column(0), first)
                first += len(batch)

    def _content(self, name: str, value: Any) -> bytes | InputError:
        content = value.as_py()
        if isinstance(content, dict):
            content = content["bytes"]
        where = f"{self.name}, {name}"
        if content is None:
            return ImageError(f"{where}: has no bytes; files beside the parquet file are not followed")
        try:
            _check_size(where, len(content))
        except ImageError as error:
            return error
        return bytes(content)


@contextmanager
def _parquet_file(file: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingDependencyError(
            "Parquet files are read with pyarrow, which is not installed: pip install 'evalkit[parquet]'"
        ) from None
    try:
        # Opened here, because pyarrow takes no names that are not UTF-8.
        with readable(str(file)), file.open("rb") as stream:
            start = stream.read(64)
            stream.seek(0)
            with parquet.ParquetFile(stream) as table:
                yield table
    except ArrowException as error:
        what = "" if start.startswith(b"PAR1") else f": it is {kind_of(start)}"
        raise InputError(f"{file}: no valid parquet file{what} ({error}); copy it again") from error


def _column_problem(column: Any) -> str | None:
    """Why a column is not one class a row; None where it is."""
    from pyarrow import types

    if not types.is_integer(column.type):
        return f"expected integers, found {column.type}"
    if column.null_count:
        return f"{column.null_count:,} of {len(column):,} are null"
    if types.is_uint64(column.type) and len(column) and column.to_numpy().max() > np.iinfo(np.int64).max:
        return "the largest does not fit into a signed 64-bit integer"
    return None


def _split_of(parts: Iterable[str]) -> str:
    """The split that a path is of, such as ``data/train-00000-of-00001.parquet`` or ``val2017/0.png``."""
    for part in parts:
        words: list[str] = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", part)
        if (word := next((word.lower() for word in words if word.lower() in _SPLITS), None)) is not None:
            return word
    return ""


def _splits_note(name: str, counts: Mapping[str, int], what: str) -> str | None:
    """Tells of a folder that holds several splits of a data set, which are measured together."""
    splits = {split: count for split, count in counts.items() if split}
    if len(splits) < 2:
        return None
    found = ", ".join(f"{split} ({count:,} {what})" for split, count in sorted(splits.items()))
    return (
        f"{name} holds several splits, all of which are used: {found}. Give one alone if that is not meant."
    )


def first_folders(names: list[str]) -> list[str]:
    """Of each relative POSIX path, the first folder that not all share; empty for one that is in none."""
    paths = [name.split("/") for name in names]
    depths = zip(*(path[:-1] for path in paths), strict=False)
    common = sum(1 for _ in takewhile(lambda folders: len(set(folders)) == 1, depths))
    return [path[common] if len(path) > common + 1 else "" for path in paths]


def _image_column(name: str, schema: Any) -> str:
    """The one column of ``{bytes, path}`` or of bytes; of several, the one called ``image`` or ``img``."""
    from pyarrow import types

    found = [
        field.name
        for field in schema
        if types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    named = [column for column in found if column in ("image", "img")] or found
    if len(named) != 1:
        raise InputError(
            f"{name}: which column holds the images? Expected image, img or only one of encoded bytes; "
            f"found {', '.join(found) or 'none'} of the columns {', '.join(schema.names)}"
        )
    return str(named[0])
