"""Python's collection of garbage, paused where it could stop the work."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ["paused_collection"]

_lock = threading.Lock()
_holders = 0
_was_enabled = False


@contextlib.contextmanager
def paused_collection(*, needed: bool = True) -> Iterator[None]:
    """No thread collects cycles of garbage while the block runs; what is garbage is collected later.

    h5py holds a lock of its own while it reads, and needs it to free its objects. Where it reads from a URL,
    it waits for another thread. If that thread collected garbage with h5py's objects in it, each would wait
    for the other.

    Args:
        needed: Whether to pause at all.
    """
    global _holders, _was_enabled
    if not needed:
        yield
        return
    with _lock:
        if not _holders:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if not _holders and _was_enabled:
                gc.enable()
