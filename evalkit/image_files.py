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
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import ImageError, InputError, MissingDependencyError

__all__ = [
    "DATASET",
    "DECODERS",
    "MAX_IMAGE_BYTES",
    "READ_ERRORS",
    "ImageFiles",
    "check_member_name",
    "is_image",
    "open_image_files",
    "readable",
]

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
DECODERS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Naming the decoders keeps Pillow's many others (some start external programs) away from untrusted files."""

DATASET = PurePosixPath("dataset.json")
"""Where the datasets of EDM and StyleGAN keep their labels."""

MAX_IMAGE_BYTES = 2**28
"""One image, encoded or decoded; as RGB it is Pillow's limit against decompression bombs, 89 megapixels."""

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
)


class ImageFiles(ABC):
    """Encoded images in the order of their names.

    Attributes:
        name: The path as it was given.
        kind: ``"folder"``, ``"zip"``, ``"tar"`` or ``"parquet"``.
        names: Relative POSIX path of each image; in a parquet file its file and row.
        labels: ``(n,)`` int64 where the container has them (``dataset.json``, a column), or None.
        notes: What the user should know and that is no error, a sentence each.
    """

    def __init__(self, name: str, kind: str, names: list[str]) -> None:
        self.name = name
        self.kind = kind
        self.names = names
        self.labels: NDArray[np.int64] | None = None
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

    def digest(self, look: Callable[[str, bytes], object]) -> str:
        """Hex sha256 over the contents in order; for a zip, over the checksums that it has of them.

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
        head = file.read(4)
    if head.startswith(b"PK"):
        return _Zip(path)
    if head == b"PAR1":
        return _Parquet(path, [path])
    if tarfile.is_tarfile(path):
        return _Tar(path)
    return None


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


def is_image(name: PurePosixPath) -> bool:
    """Whether the suffix is that of an image and no part of the path is hidden."""
    return name.suffix.lower() in _SUFFIXES and not _is_hidden(name)


def _is_hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


class _Members(ImageFiles):
    """Image files that the container lists by name: of a folder, a zip or a tar."""

    def __init__(self, name: str, kind: str, members: Mapping[PurePosixPath, Any]) -> None:
        left_out = Counter(
            "hidden" if _is_hidden(member) else member.suffix or "without suffix"
            for member in members
            if not is_image(member) and member != DATASET
        )
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
        images = sorted((str(member), value) for member, value in members.items() if is_image(member))
        if not images:
            raise InputError(
                f"{name}: no images; expected files ending in {', '.join(_SUFFIXES)}, "
                f"found {others or 'no files'}"
            )
        super().__init__(name, kind, [member for member, _ in images])
        self._members = [value for _, value in images]
        if DATASET in members:
            with readable(name), self._open() as read:
                self._take_labels(read, members[DATASET])
        if others:
            self.notes += (f"Files that are not images are left out: {others}.",)

    def _take_labels(self, read: Callable[[Any], bytes], member: Any) -> None:
        """Labels as EDM's and StyleGAN's datasets hold them: ``{"labels": [["a/b.png", 3], ...]}``."""
        if self._size(member) > MAX_IMAGE_BYTES:
            return
        try:
            labels = dict(json.loads(read(member))["labels"])
            found = np.array([labels[name] for name in self.names])
        except (ValueError, TypeError, KeyError):
            found = np.array(())
        if found.shape == (len(self),) and found.dtype.kind == "i":
            self.labels = found.astype(np.int64)
        else:
            self.notes += (f"{DATASET} is left out: it has not one integer label for each image.",)

    @abstractmethod
    def _open(self) -> AbstractContextManager[Callable[[Any], bytes]]:
        """Opens the container and gives the function that reads a member."""

    @abstractmethod
    def _size(self, member: Any) -> int:
        """The member's size in bytes, uncompressed."""

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

    def __init__(self, path: Path, files: Iterable[str], links: list[Path]) -> None:
        super().__init__(str(path), "folder", {PurePosixPath(file): file for file in files})
        if links:
            self.notes += (f"Folders that are links are not entered: {', '.join(map(str, sorted(links)))}.",)

    @contextmanager
    def _open(self) -> Iterator[Callable[[str], bytes]]:
        yield lambda name: Path(self.name, name).read_bytes()

    def _size(self, member: str) -> int:
        return Path(self.name, member).stat().st_size


def _open_folder(path: Path) -> ImageFiles:
    found: list[str] = []
    links: list[Path] = []
    with readable(str(path)):
        for folder, folders, files in os.walk(path, onerror=_raise):
            found += [(Path(folder) / file).relative_to(path).as_posix() for file in files]
            links += [link for f in folders if (link := Path(folder) / f).is_symlink()]
    tables = sorted(
        file for file in found if file.endswith(".parquet") and not _is_hidden(PurePosixPath(file))
    )
    if tables and not any(is_image(PurePosixPath(file)) for file in found):
        return _Parquet(path, [path / file for file in tables])
    return _Folder(path, found, links)


def _raise(error: OSError) -> None:
    raise error


class _Zip(_Members):
    """A zip of image files."""

    def __init__(self, path: Path) -> None:
        name = str(path)
        with readable(name), zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
        for info in infos:
            check_member_name(name, info.filename)
        super().__init__(name, "zip", {PurePosixPath(info.filename): info for info in infos})

    @contextmanager
    def _open(self) -> Iterator[Callable[[zipfile.ZipInfo], bytes]]:
        with zipfile.ZipFile(self.name) as archive:
            yield archive.read

    def _size(self, member: zipfile.ZipInfo) -> int:
        return member.file_size

    def digest(self, look: Callable[[str, bytes], object]) -> str:
        del look  # nothing is read
        checksums = [(info.CRC, info.file_size) for info in self._members]
        return hashlib.sha256(f"zip {checksums}".encode()).hexdigest()


class _Tar(_Members):
    """A tar of image files, plain or compressed."""

    def __init__(self, path: Path) -> None:
        name = str(path)
        members: dict[PurePosixPath, tarfile.TarInfo] = {}
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
                    members[member] = info
            # tarfile takes an archive that was cut between two members for a complete one.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise InputError(
                    f"{name}: has no end mark after {len(members)} files; it was cut short, copy it again"
                )
            compressed = not isinstance(tar.fileobj, io.BufferedReader)
        super().__init__(name, "tar", members)
        offsets = [info.offset for info in self._members]
        if compressed and offsets != sorted(offsets):
            raise InputError(
                f"{name}: a compressed tar can only be read in its own order, and this one is not sorted by "
                f"name; decompress it, or write it again with tar --sort=name"
            )

    @contextmanager
    def _open(self) -> Iterator[Callable[[tarfile.TarInfo], bytes]]:
        with tarfile.open(self.name) as tar:

            def read(info: tarfile.TarInfo) -> bytes:
                file = tar.extractfile(info)
                assert file is not None  # only regular files are kept
                return file.read()

            yield read

    def _size(self, member: tarfile.TarInfo) -> int:
        return member.size


class _Parquet(ImageFiles):
    """Rows of parquet files as the Hugging Face hub ships images: a column of ``{bytes, path}`` or bytes."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self._files = files
        self._rows: list[int] = []
        labels: list[NDArray[np.int64]] = []
        for file in files:
            with _parquet_file(file) as table:
                self._column = _image_column(str(file), table.schema_arrow)
                self._rows.append(table.metadata.num_rows)
                if "label" in table.schema_arrow.names:
                    column = table.read(["label"]).column("label").to_numpy()
                    if column.dtype.kind in "ui":
                        labels.append(column.astype(np.int64))
        names = [
            f"{file.relative_to(path).as_posix() if file != path else file.name}/{row:08d}"
            for file, rows in zip(files, self._rows, strict=True)
            for row in range(rows)
        ]
        if not names:
            raise InputError(f"{path}: its parquet files have no rows; expected at least one image")
        super().__init__(str(path), "parquet", names)
        if sum(map(len, labels)) == len(names):
            self.labels = np.concatenate(labels)

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
        with readable(str(file)), parquet.ParquetFile(file) as table:
            yield table
    except ArrowException as error:
        raise InputError(f"{file}: no valid parquet file ({error}); copy it again") from error


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
