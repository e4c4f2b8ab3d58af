"""Atomic output files, the cache folder, file type detection, digests of tensors, and text files."""

from __future__ import annotations

import codecs
import contextlib
import errno
import glob
import hashlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from evalkit import __version__
from evalkit.errors import OutputError
from evalkit.system.storage import Place, Remote
from evalkit.system.urls import is_url, shown

__all__ = [
    "cache_directory",
    "check_writable",
    "expand_user",
    "home_directory",
    "kind_of",
    "physical_memory",
    "read_text",
    "remove_stale_partials",
    "replace_atomically",
    "tensor_digest",
    "torch_hub_checkpoints",
    "versions",
    "working_path",
    "xdg_cache_home",
]

# A partial file that was not modified for this long was left by a killed run.
STALE_SECONDS = 3600.0


@contextlib.contextmanager
def replace_atomically(path: Place, *, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; renamed to ``path`` on success, removed on any failure.

    Output for a URL is kept in the cache folder, and uploaded as a whole at the end.

    Args:
        path: The file to write; an existing file is replaced.
        folder: Yield an empty folder instead of a file. An existing folder is not replaced.

    Raises:
        OutputError: The folder is missing or not writable, the disk is full, or the server refuses.
    """
    check_writable(path)
    local = working_path(path)
    # Threads share a process ID, and processes in two containers may; only a random name is unique.
    partial = local.with_name(f".{local.name}.{uuid.uuid4().hex}.partial")
    try:
        if folder:
            partial.mkdir()
            yield partial
        else:
            partial.touch(exist_ok=False)
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        if isinstance(path, Remote):
            from evalkit.system.uploads import upload  # here, so that local files load no network code

            upload(partial, path)
        else:
            partial.replace(path)
    except OSError as error:
        # HDF5 reports a full disk with the system's message, sometimes without its error number.
        full = error.errno == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
        reason = "no space left on the device" if full else str(error.strerror or error)
        raise OutputError(f"Cannot write {path}: {reason}. What was there before is unchanged.") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial) if folder else partial.unlink()


def working_path(place: Place) -> Path:
    """Local path at which an output is created: the path itself; for a URL, a path in the cache folder.

    Raises:
        OutputError: The folder cannot be created.
    """
    if not isinstance(place, Remote):
        return place
    folder = cache_directory() / "outputs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Cannot make {folder}, for what will be {place}: {error.strerror}. Set EVALKIT_CACHE to another "
            "folder."
        ) from error
    remove_stale_partials(folder)
    digest = hashlib.sha256(place.identity.encode()).hexdigest()
    return folder / f"{digest[:16]}-{place.name[-100:]}"


def check_writable(path: Place, *inputs: str | os.PathLike[str]) -> None:
    """Check before long work that ``path`` can be written.

    Args:
        path: The file to write.
        *inputs: Paths and patterns of files that must not be overwritten; other names are ignored.

    Raises:
        OutputError: The file cannot be written, or is one of the inputs.
    """
    if isinstance(path, Remote):
        from evalkit.system.uploads import check_destination

        check_destination(path)
        here = PurePosixPath(str(path))
        if any(is_url(name) and here.match(shown(os.fspath(name))) for name in inputs):
            raise OutputError(f"Cannot write {path}: it is the input, or named like it. Give another name.")
        return
    try:
        _check_writable(path, *inputs)
    except OSError as error:  # for example a name that is too long, or a folder without permission
        raise OutputError(f"Cannot write {path}: {error.strerror}.") from error


def _check_writable(path: Path, *inputs: str | os.PathLike[str]) -> None:
    folder = path.parent
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OutputError(f"Cannot write {path}: it is not a regular file. Give another name.")
    # An input may be a pattern that matches several files.
    files = [file for name in inputs for file in (name, *glob.glob(os.fspath(name), recursive=True))]  # noqa: PTH207
    if path.is_file() and any(Path(name).exists() and path.samefile(name) for name in files):
        raise OutputError(f"Cannot write {path}: it is the input. Give another name.")
    if path.is_dir():
        raise OutputError(f"Cannot write {path}: it is a folder. Give the name of a file.")
    if not folder.is_dir():
        raise OutputError(f"Cannot write {path}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"Cannot write {path}: the folder {folder} is not writable.")


def remove_stale_partials(folder: Path, name: str = "") -> None:
    """Remove temporary files that killed runs left in ``folder``: all of them, or those of one name."""
    for partial in folder.glob(f".{glob.escape(name)}{'.' if name else ''}*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def cache_directory() -> Path:
    """The cache folder, for data that can be downloaded or computed again; it may not exist yet.

    Returns:
        ``$EVALKIT_CACHE`` if set, else ``evalkit`` in the platform's cache folder: ``$XDG_CACHE_HOME`` or
        ``~/.cache``, ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows.

    Raises:
        OutputError: None of these is known, because the user has no home folder.
    """
    if chosen := os.environ.get("EVALKIT_CACHE"):
        return expand_user(chosen)
    if sys.platform == "darwin":
        return home_directory() / "Library" / "Caches" / "evalkit"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home_directory() / "AppData" / "Local") / "evalkit"
    return xdg_cache_home() / "evalkit"


def xdg_cache_home() -> Path:
    """``$XDG_CACHE_HOME``, or ``~/.cache``.

    Raises:
        OutputError: Neither is known, because the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or home_directory() / ".cache")


def torch_hub_checkpoints() -> Path:
    """The folder of weights downloaded by torch.hub: ``$TORCH_HOME/hub/checkpoints``.

    Raises:
        OutputError: ``TORCH_HOME`` is not set, and the user has no home folder.
    """
    return expand_user(os.environ.get("TORCH_HOME") or xdg_cache_home() / "torch") / "hub" / "checkpoints"


def home_directory() -> Path:
    """The user's home folder.

    Raises:
        OutputError: There is none, for example for an unnamed user in a container.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise OutputError(
            "This user has no home folder. Set EVALKIT_CACHE to a folder for evalkit's cache, or HOME."
        ) from error


def expand_user(path: str | os.PathLike[str]) -> Path:
    """``path`` with a leading ``~`` replaced by the user's home folder.

    Raises:
        OutputError: That user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OutputError(f"{path}: there is no such home folder. Give the full path.") from error


# First bytes of files that users mistake for images, samples or weights.
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself: `git lfs pull` gets that"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"(\xb5/\xfd", "a Zstandard file"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x89PNG", "a single PNG image"),
    (b"\xff\xd8\xff", "a single JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\x93NUMPY", "a NumPy npy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PAR1", "a parquet file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"PK", "a zip archive"),
)


def kind_of(start: bytes) -> str:
    """Describe the type of a file, from its first bytes (at least 16)."""
    if not start:
        return "empty"
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"<":
        return "a web page, as a failed download leaves it"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle, as torch.save also wrote before PyTorch 1.6"
    if start[4:8] == b"ftyp":
        return "a video, or an AVIF or HEIC image"
    if start[8:9] == b"{" and start[4:8] == bytes(4):
        return "a safetensors file"
    if (what := next((what for first, what in _KINDS if start.startswith(first)), None)) is not None:
        return what
    text = start.decode("ascii", "replace")
    if text.isascii() and "\0" not in text:
        return f"a text that begins with {text[:40]!r}"
    return "of an unknown kind"


def tensor_digest(tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """Digest of named float32 arrays, independent of the file type they came from.

    Args:
        tensors: Arrays of any shape, by name.

    Returns:
        Hex sha256 over the arrays, sorted by name: for each, its name, its shape written as a Python tuple,
        and its values as little-endian float32 in C order.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name], dtype="<f4")
        digest.update(f"{name}{values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()


# UTF-32 comes first, because its byte order marks start with those of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Read a text file written by a user: UTF-8, or the encoding given by its byte order mark.

    Notepad writes UTF-8 with a mark, and PowerShell's ``>`` UTF-16 with one. Line endings are preserved.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not text in one of these encodings.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not text in UTF-8, nor in UTF-16 with a byte order mark (byte {error.start:,})"
        ) from error
    if "\0" in text:
        raise ValueError(
            "it contains NUL bytes: it is not text, or UTF-16 without a byte order mark. Save it as UTF-8"
        )
    return text


def physical_memory() -> int | None:
    """Memory of this machine in bytes; None if the system does not report it, as on Windows."""
    try:
        size, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return size * pages if size > 0 and pages > 0 else None


def versions(*packages: str) -> dict[str, str]:
    """Version of each package that is installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            # evalkit also works from a checkout that is not installed.
            found[package] = __version__ if package == "evalkit" else version(package)
    return found
