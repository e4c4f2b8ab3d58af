"""A lock between processes. The operating system frees it however its process ends."""

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
