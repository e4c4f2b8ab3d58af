"""Files that appear whole or not at all, the folder where evalkit keeps its own, and what weights are."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import OutputError

__all__ = [
    "cache_directory",
    "check_writable",
    "only_process",
    "remove_stale_partials",
    "replace_atomically",
    "tensor_digest",
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
