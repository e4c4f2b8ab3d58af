"""A lock between processes, which the operating system releases however its process ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from evalkit.errors import OutputError

__all__ = ["exclusive_lock"]


@contextlib.contextmanager
def exclusive_lock(
    path: Path,
    work: str,
    *,
    wait: bool = False,
    advice: str = "Wait for it or stop it, or name another output.",
) -> Iterator[None]:
    """Hold the lock file ``path`` within the block.

    The file is not removed. To remove it, unlink it inside the block: filelock 3.24 and later detect this in
    all waiting processes.

    Args:
        path: A file in an existing folder; created if it does not exist.
        work: What this process does in the block, for the message: ``"building ref.npz"``.
        wait: Wait until another process releases the lock, instead of raising.
        advice: What to do if another process holds the lock, for the message.

    Raises:
        OutputError: Another process holds the lock and ``wait`` is false, or the file cannot be opened.
    """
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"Another process is {work}. {advice}") from None
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error
    except NotImplementedError:  # a file system without locks: access cannot be refused
        yield
        return
    try:
        yield
    finally:
        lock.release()
