"""HDF5 files on this machine and at URLs, read so that nothing waits for h5py's lock for ever."""

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


@contextlib.contextmanager
def opened_hdf5(place: Place) -> Iterator[Any]:
    """An :class:`h5py.File` to read, with :func:`paused_collection` while it is open if it is at a URL."""
    with (
        paused_collection(needed=isinstance(place, Remote)),
        file_or_path(place) as opened,
        h5py.File(opened, "r") as file,
    ):
        yield file
