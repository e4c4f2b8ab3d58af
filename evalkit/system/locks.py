"""Locks between processes. The operating system frees a lock however its process ends.

:func:`exclusive_lock` is for one process at a time. :func:`claim` is for processes that share work: each byte
of a file stands for a piece of it. Claims are POSIX record locks (``fcntl.lockf``) and not ``flock``: a child
of a process does not inherit them, and so cannot keep them after its parent's death.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from filelock import FileLock, Timeout

from evalkit.errors import OutputError

__all__ = ["HAS_CLAIMS", "claim", "exclusive_lock", "release", "try_claim"]

HAS_CLAIMS = fcntl is not None
"""Whether this system has record locks. Without them, a process cannot share work with others."""


@contextlib.contextmanager
def exclusive_lock(
    path: Path,
    work: str,
    *,
    wait: bool = False,
    advice: str = "Wait for it or stop it, or name another output.",
) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs.

    The file may stay. To remove it, unlink it inside the block: filelock 3.24 and later notice that in all
    processes that wait for it.

    Args:
        path: A file in an existing folder; created if it does not exist.
        work: What this process does meanwhile, for the message: ``"building ref.npz"``.
        wait: Wait until another process releases it, instead of raising.
        advice: What to do where another process holds it, for the message.

    Raises:
        OutputError: Another process holds it and ``wait`` is false, or it cannot be opened.
    """
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"Another process is {work}. {advice}") from None
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error
    except NotImplementedError:  # a file system without locks: nothing can be refused
        yield
        return
    try:
        yield
    finally:
        lock.release()


def try_claim(
    file: IO[bytes], byte: int, elsewhere: str, *, exclusive: bool = True, wait: bool = False
) -> bool:
    """Whether this process now holds a byte of an open file; it always does on a system without claims.

    Args:
        file: Open for writing.
        byte: Its offset; the file need not be as long.
        elsewhere: What to do on a file system without locks, a sentence.
        exclusive: Whether no other process may hold it, too.
        wait: Wait until another process releases it.

    Raises:
        OutputError: The file system has no locks.
    """
    if fcntl is None:
        return True
    how = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.lockf(file, how if wait else how | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise OutputError(
                f"The file system of {file.name} has no file locks ({error.strerror}), which processes "
                f"need to share work. {elsewhere}"
            ) from error
        return False
    return True


def release(file: IO[bytes], byte: int) -> None:
    """Give up a byte that this process holds."""
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)


@contextlib.contextmanager
def claim(file: IO[bytes], byte: int, elsewhere: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds a byte of the file while the block runs; see :func:`try_claim`."""
    if not try_claim(file, byte, elsewhere, wait=wait):
        yield False
        return
    try:
        yield True
    finally:
        release(file, byte)
