"""What all readers of images share: a path to be opened, the limit on one image, damage as InputErrors."""

from __future__ import annotations

import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from evalkit.errors import ImageError, InputError
from evalkit.system.storage import Place, Remote

__all__ = ["MAX_IMAGE_BYTES", "READ_ERRORS", "Candidate", "check_size", "readable"]

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
    struct.error,
    UnicodeError,  # names in the directory of a zip
    NotImplementedError,  # what zipfile knows of and cannot read
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An existing file or folder for which a reader is looked for.

    Attributes:
        path: As it was given.
        is_folder: Whether it is a folder.
        head: The file's first 64 bytes; empty for a folder.
    """

    path: Place
    is_folder: bool
    head: bytes

    @classmethod
    def at(cls, path: Place) -> Self:
        """Look at a path.

        Raises:
            InputError: It is missing, or neither a file nor a folder.
        """
        if isinstance(path, Remote):
            if path.is_dir():
                return cls(path=path, is_folder=True, head=b"")
            with path.open() as remote:
                return cls(path=path, is_folder=False, head=remote.read(64))
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder")
        if path.is_dir():
            return cls(path=path, is_folder=True, head=b"")
        if not path.is_file():
            raise InputError(f"{path}: is not a regular file; expected a file or a folder")
        with path.open("rb") as file:
            return cls(path=path, is_folder=False, head=file.read(64))


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what the readers raise for damaged or unreadable files into an InputError."""
    try:
        yield
    except READ_ERRORS as error:
        raise InputError(
            f"{name}: cannot be read ({type(error).__name__}: {error}); "
            f"check that the file is complete and not protected, or copy it again"
        ) from error


def check_size(where: str, size: int) -> None:
    """Raise an ImageError for an encoded image of more than :data:`MAX_IMAGE_BYTES` bytes."""
    if size > MAX_IMAGE_BYTES:
        raise ImageError(f"{where}: {size} bytes; one image is limited to {MAX_IMAGE_BYTES}")
