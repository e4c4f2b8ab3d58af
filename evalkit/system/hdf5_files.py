"""Read HDF5 files on this machine and at URLs, without deadlocks on h5py's lock."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

import h5py

from evalkit.system.storage import Place, Remote, file_or_path

__all__ = ["opened_hdf5", "paused_collection"]

_lock = threading.Lock()
_holders = 0
_was_enabled = False


@contextlib.contextmanager
def paused_collection(*, needed: bool = True) -> Iterator[None]:
    """Pause Python's garbage collector within the block; garbage is collected afterwards.

    h5py holds a global lock while it reads, and also needs it to free its objects. When it reads from a URL,
    it waits for another thread. If the garbage collector freed h5py objects in that thread, the two threads
    would deadlock.

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


@contextlib.contextmanager
def opened_hdf5(place: Place) -> Iterator[Any]:
    """Open an :class:`h5py.File` for reading, with :func:`paused_collection` if it is at a URL."""
    with (
        paused_collection(needed=isinstance(place, Remote)),
        file_or_path(place) as opened,
        h5py.File(opened, "r") as file,
    ):
        yield file
