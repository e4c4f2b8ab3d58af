"""Image files in a zip or a tar, read without being extracted; and the checks of any zip."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tempfile
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from evalkit.errors import InputError, listing
from evalkit.images.files import Members
from evalkit.images.names import duplicates_note, is_image
from evalkit.images.reading import Candidate, readable
from evalkit.system.space import check_free_space
from evalkit.system.storage import Place, file_or_path

__all__ = ["Tar", "Zip", "check_member_name", "check_zip", "is_pytorch", "open_tar"]


class Zip(Members):
    """A zip of image files."""

    def __init__(self, path: Place) -> None:
        name = str(path)
        self._path = path
        with readable(name), file_or_path(path) as file, zipfile.ZipFile(file) as archive:
            _refuse_pytorch(name, archive.namelist())
            infos = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
            notes = check_zip(path, archive)
        for info in infos:
            check_member_name(name, info.filename)
        super().__init__(name, "zip", ((info.filename, info) for info in infos), notes)

    @classmethod
    def claims(cls, candidate: Candidate) -> bool:
        """Whether the file begins as zips do."""
        return candidate.head.startswith(b"PK")

    @contextmanager
    def _open(self) -> Iterator[Callable[[zipfile.ZipInfo], bytes]]:
        with file_or_path(self._path) as file, zipfile.ZipFile(file) as archive:
            yield archive.read

    def _size(self, member: zipfile.ZipInfo) -> int:
        return member.file_size


class Tar(Members):
    """A tar of image files, plain or compressed.

    A compressed one can only be read from its beginning to its end. If that is not the order of its names, it
    is unpacked to a temporary file when it is first read.
    """

    _kind = "tar"

    def __init__(self, path: Place) -> None:
        name = str(path)
        self._path = path
        members: list[tuple[str, tarfile.TarInfo]] = []
        others: list[str] = []
        with readable(name), open_tar(path) as tar:
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
        super().__init__(name, self._kind, members, notes)
        self.reads_in_order = compressed
        offsets = [info.offset for info in self._members]
        if compressed and offsets != sorted(offsets):
            self._is_ordered = self.reads_in_order = self.reads_in_pieces = False
            self.notes += (
                f"{name} is compressed and not in the order of its names: it is unpacked to a temporary "
                f"file of {self._unpacked_bytes / 1e9:.2g} GB.",
            )

    @classmethod
    def claims(cls, candidate: Candidate) -> bool:
        """Whether it is a tar, plain or compressed."""
        if candidate.is_folder:
            return False
        with file_or_path(candidate.path) as file:
            return tarfile.is_tarfile(file)

    @contextmanager
    def _open(self) -> Iterator[Callable[[tarfile.TarInfo], bytes]]:
        with open_tar(self._path if self._is_ordered else self._unpack()) as tar:

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
        check_free_space(
            Path(tempfile.gettempdir()),
            self._unpacked_bytes,
            f"{self.name}, unpacked,",
            "Set TMPDIR to a folder with more, or write the archive again with tar --sort=name, in one "
            "folder.",
        )
        with tempfile.NamedTemporaryFile(prefix="evalkit-", suffix=".tar", delete=False) as unpacked:
            weakref.finalize(self, _remove, unpacked.name)
            with open_tar(self._path) as tar:
                assert tar.fileobj is not None
                tar.fileobj.seek(0)
                while block := tar.fileobj.read(2**20):
                    unpacked.write(block)
        # Only now, so that another thread never meets a part of it.
        self._unpacked = Path(unpacked.name)
        return self._unpacked


@contextmanager
def open_tar(place: Place) -> Iterator[tarfile.TarFile]:
    """A tar, plain or compressed, opened."""
    if isinstance(place, Path):
        with tarfile.open(place) as tar:
            yield tar
    else:
        with place.open() as file, tarfile.open(fileobj=file) as tar:
            yield tar


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _check_end(name: str, tar: tarfile.TarFile, count: int) -> int:
    """Size in bytes, unpacked, of an archive whose members were all listed.

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
                f"{name}: there is more data after the end of the archive, which has {count:,} files; it "
                "looks like archives joined with cat. Unpack it with tar --ignore-zeros, or join archives "
                "with tar --concatenate"
            )
    return tar.fileobj.tell()


# ---------------------------------------------------------------------------------------------- checks


def check_member_name(archive: str, name: str) -> None:
    """Raise an InputError for a path that would leave the archive.

    Raises:
        InputError: The path is absolute or has ``..`` in it.
    """
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        raise InputError(f"{archive}: refused for its member {name!r}; expected relative paths without '..'")


def is_pytorch(members: Iterable[str]) -> bool:
    """Whether these are the members of a PyTorch file, a zip of a pickle and raw numbers."""
    return any(name == "data.pkl" or name.endswith("/data.pkl") for name in members)


def _refuse_pytorch(name: str, members: Iterable[str]) -> None:
    """Raise an InputError for a PyTorch file: a pickle is never loaded."""
    if is_pytorch(members):
        raise InputError(
            f"{name}: is a PyTorch file, as torch.save writes it: a pickle, which could run code and is "
            "never loaded. Save the images with np.savez(path, x.cpu().numpy()), as (n, height, width, 3) "
            "uint8"
        )


def check_zip(place: Place, archive: zipfile.ZipFile) -> tuple[str, ...]:
    """Check a zip's directory; the result is notes on what is not used because of it.

    Raises:
        InputError: Another archive stands before this one, or the directory is damaged.
    """
    name, infos = str(place), archive.infolist()
    with place.open("rb") as file:
        start = file.read(4)
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _ZIP_END_BYTES))
        said, rest = _members_said(file.read())
    # Some writers of large archives keep only the last 16 bits of the number.
    if (said - len(infos)) % 2**16:
        raise InputError(
            f"{name}: its directory lists {len(infos):,} members, and its end says that there are {said:,}; "
            "it is damaged, copy it again"
        )
    for info in infos:
        if "\0" in info.orig_filename or (info.filename.endswith("/") and info.file_size):
            raise InputError(f"{name}: {info.orig_filename!r} is not a file name; the zip is damaged")
    first = min((info.header_offset for info in infos), default=0)
    if first > 0 and start == b"PK\x03\x04":
        raise InputError(
            f"{name}: it begins with {first:,} bytes of another zip, or of members that its directory does "
            "not list. Archives that were joined must be unpacked one by one"
        )
    again = [member for member, count in Counter(info.filename for info in infos).items() if count > 1]
    notes: tuple[str, ...] = (duplicates_note(name, again),) if again else ()
    if rest:
        notes += (f"{name} has {rest:,} more bytes after its end, which are not used.",)
    return notes


# A comment of 65,535 bytes, the end record, and the second end record and locator of 64-bit archives.
_ZIP_END_BYTES = 65_535 + 22 + 20 + 56


def _members_said(end: bytes) -> tuple[int, int]:
    """The number of members according to the end of a zip, and how many bytes follow that end."""
    at = len(end) - 22
    if end[at : at + 4] != b"PK\5\6":
        at = end.rfind(b"PK\5\6")
    count, comment = struct.unpack_from("<H8xH", end, at + 10)
    if count == 0xFFFF and (large := end.rfind(b"PK\6\6", 0, at)) >= 0:
        (count,) = struct.unpack_from("<Q", end, large + 32)
    return int(count), max(0, len(end) - (at + 22 + comment))
