"""Weights and layers that several extractors have in common are in a process once.

Extractors that differ in the resize alone share both, as long as one of them is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from evalkit.system.identity import stamp

__all__ = ["kept", "read_once", "shared"]

T = TypeVar("T")

_IN_USE: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
_MOST = 4
_KEPT: dict[Hashable, Any] = {}


def shared(key: Hashable, build: Callable[[], T]) -> T:
    """What was built for this key in this process and is still in use, or is built now."""
    found: T | None = _IN_USE.get(key)
    if found is None:
        _IN_USE[key] = found = build()
    return found


def kept(key: Hashable, build: Callable[[], T]) -> T:
    """As :func:`shared`; the last few are kept even when nothing uses them."""
    found = shared(key, build)
    _KEPT.pop(key, None)
    _KEPT[key] = found
    for old in [*_KEPT][:-_MOST]:
        del _KEPT[old]
    return found


def read_once(file: Path, what: Hashable, read: Callable[[], T]) -> T:
    """What ``read`` returns; an unchanged file whose content is in use is not read again.

    Args:
        file: The file. If it is missing, ``read`` says so.
        what: Everything else that the result depends on.
        read: Reads the file.
    """
    try:
        version, _ = stamp([file])
    except OSError:
        return read()
    return shared((what, str(file), version), read)
