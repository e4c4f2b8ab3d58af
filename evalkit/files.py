"""Files that appear whole or not at all, the folder where evalkit keeps its own, and what weights are."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import numpy as np
from numpy.typing import NDArray

from evalkit import __version__
from evalkit.errors import OutputError

__all__ = [
    "cache_directory",
    "check_writable",
    "only_process",
    "physical_memory",
    "read_text",
    "remove_stale_partials",
    "replace_atomically",
    "tensor_digest",
    "versions",
    "xdg_cache_home",
]

# A partial file that nobody has touched for this long belongs to a run that was killed.
STALE_SECONDS = 3600.0


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; renamed to ``path`` on success, removed on any failure.

    Raises:
        OutputError: The folder is missing or not writable, or the disk is full.
    """
    check_writable(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        # HDF5 reports a full disk with the system's text and sometimes without its number.
        full = error.errno == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
        reason = "no space left on the device" if full else str(error.strerror or error)
        raise OutputError(f"Cannot write {path}: {reason}. What was there before is unchanged.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def check_writable(path: Path, *inputs: str | os.PathLike[str]) -> None:
    """Cheap check before long work that ``path`` can be written.

    Args:
        path: The file to write.
        *inputs: Paths, or names of other things, that must not be overwritten by it.

    Raises:
        OutputError: It cannot, or is one of the inputs.
    """
    folder = path.parent
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OutputError(f"Cannot write {path}: it is no ordinary file. Give another name.")
    if path.is_file() and any(Path(name).exists() and path.samefile(name) for name in inputs):
        raise OutputError(f"Cannot write {path}: it is the input. Give another name.")
    if path.is_dir():
        raise OutputError(f"Cannot write {path}: it is a folder. Give the name of a file.")
    if not folder.is_dir():
        raise OutputError(f"Cannot write {path}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"Cannot write {path}: the folder {folder} is not writable.")


@contextlib.contextmanager
def only_process(lock: Path, work: str) -> Iterator[None]:
    """Holds the file ``lock``, which stays, while the block runs; the kernel frees it however that ends.

    Args:
        lock: A file in a folder that is there. Where the system has no such locks, nothing is refused.
        work: What is done meanwhile, for the message.

    Raises:
        OutputError: Another process holds it, or it cannot be opened.
    """
    try:
        file = lock.open("ab")
    except OSError as error:
        raise OutputError(f"Cannot write {lock}: {error.strerror}.") from error
    with file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"Another process is {work}. Wait for it or stop it, or name another output."
                ) from None
            except OSError:  # a file system without locks
                pass
        yield


def remove_stale_partials(folder: Path) -> None:
    """Remove what killed runs left behind in ``folder``."""
    for partial in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                partial.unlink()


def cache_directory() -> Path:
    """The directory where evalkit keeps what it may fetch or compute again; it may not exist yet.

    Returns:
        ``$EVALKIT_CACHE`` where set, else ``evalkit`` in the platform's place for caches:
        ``$XDG_CACHE_HOME`` or ``~/.cache``, ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows.
    """
    if chosen := os.environ.get("EVALKIT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "evalkit"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "evalkit"
    return xdg_cache_home() / "evalkit"


def xdg_cache_home() -> Path:
    """``$XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def tensor_digest(tensors: Mapping[str, NDArray[np.float32]]) -> str:
    """Digest of named float32 arrays that does not depend on the file they came in.

    Args:
        tensors: Arrays of any shape under their names.

    Returns:
        Hex sha256 over the arrays sorted by name: for each its name, its shape written as a Python tuple, and
        its values as little-endian float32 in C order.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name], dtype="<f4")
        digest.update(f"{name}{values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()


# UTF-32's before UTF-16's, which are its beginning.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """The text of a file that a user wrote: UTF-8, or what its byte order mark says.

    Notepad writes UTF-8 with a mark, and PowerShell's ``>`` UTF-16 with one. Ends of lines stay as they are.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such text.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is no text in UTF-8, nor in UTF-16 with a byte order mark (byte {error.start:,})"
        ) from error
    if "\0" in text:
        raise ValueError("it has zero bytes: it is no text, or UTF-16 without a byte order mark")
    return text


def physical_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say, as on Windows."""
    try:
        size, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return size * pages if size > 0 and pages > 0 else None


def versions(*packages: str) -> dict[str, str]:
    """Versions by package: evalkit's own, and of others those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            # A checkout of evalkit works without being installed.
            found[package] = __version__ if package == "evalkit" else version(package)
    return found
