"""Hashes of file contents, cached so that each file is read only once.

A batch is identified by a hash of its content (:attr:`evalkit.images.ImageSource.digest`), never by metadata
in the file. Hashing reads the whole file. The result is cached under the file's path, with its size, inode
and times; as long as these stay the same, the file is not read again. For a file at a URL, the cache uses its
size and the version or time that the server gives; if the server gives none, the file is read every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from evalkit.errors import EvalkitError, InputError
from evalkit.system.files import cache_directory, replace_atomically
from evalkit.system.storage import Place, Remote, size_of

__all__ = ["check_unchanged", "recall", "stamp"]

FORMAT = "evalkit contents 1"

SETTLED_SECONDS = 2.0
"""File systems store times with a resolution of up to 2 s (FAT). A file changed more recently than this may
change again unnoticed."""


_LARGE_BYTES = 10**9

_log = logging.getLogger(__name__)


def stamp(paths: Iterable[Place]) -> tuple[str, float]:
    """Fingerprint of files, which changes when any of them changes.

    Args:
        paths: Files, in a fixed order; or a folder at a URL.

    Returns:
        Hex sha256 over the path, size, device, inode and times of each file; and the time of the most recent
        change, in seconds since 1970, infinite if changes cannot be detected.

    Raises:
        OSError: A file is missing.
        RemoteError: A file at a URL is missing or inaccessible.
    """
    digest, latest = hashlib.sha256(), 0.0
    for path in paths:
        if isinstance(path, Remote):
            text, changed = path.stamp()
            digest.update(f"{text}\n".encode())
            latest = max(latest, changed)
            continue
        found = path.stat()
        # Unlike the modification time, the inode's change time cannot be set back.
        numbers = (found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
        digest.update(f"{os.path.realpath(path)!r} {numbers}\n".encode())
        latest = max(latest, found.st_mtime, found.st_ctime)
    return digest.hexdigest(), latest


def recall(
    name: Place,
    kind: str,
    paths: Callable[[], Iterable[Place]],
    examine: Callable[[], Mapping[str, Any]],
    *,
    remember: bool = True,
) -> tuple[Mapping[str, Any], str]:
    """Return the cached result of ``examine`` for these files, or call it; also return their :func:`stamp`.

    Args:
        name: The path given by the user; the cache key.
        kind: The type of reader.
        paths: Returns the files that determine the result.
        examine: Reads them. Its result is cached as JSON.
        remember: Whether to cache the result. False if the files can change without changing their stamp.

    Raises:
        InputError: The files changed while they were read.
        EvalkitError: Raised by ``examine``.
    """
    before, changed = stamp(paths())
    key = json.dumps([FORMAT, kind, name.identity if isinstance(name, Remote) else os.path.realpath(name)])
    record = None
    with contextlib.suppress(EvalkitError):  # no home folder, so no cache: the files are read every time
        if remember:
            record = cache_directory() / "contents" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if record is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["stamp"] == before and known["key"] == key and known["sha256"] == _seal(known):
                return dict(known["found"]), before
    _announce(str(name), paths())
    begun = time.time()
    found = examine()
    check_unchanged(str(name), before, paths())
    # A second change within the clock's resolution could not be detected.
    if record is not None and changed < begun - SETTLED_SECONDS:
        with contextlib.suppress(OSError, EvalkitError):  # the files are read again next time
            record.parent.mkdir(parents=True, exist_ok=True)
            with replace_atomically(record) as partial:
                content = {"key": key, "stamp": before, "found": dict(found)}
                partial.write_text(json.dumps(content | {"sha256": _seal(content)}), encoding="utf-8")
    return found, before


def _announce(name: str, paths: Iterable[Place]) -> None:
    """Announce that a large file will be read over the network."""
    size = sum(size_of(path) for path in paths if isinstance(path, Remote) and not path.is_dir())
    if size > _LARGE_BYTES:
        _log.info("%s: reading all %.1f GB once to compute a checksum", name, size / 1e9)


def _seal(record: Mapping[str, Any]) -> str:
    """Checksum of a record."""
    content = json.dumps([record["key"], record["stamp"], record["found"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def check_unchanged(name: str, before: str, paths: Iterable[Place]) -> None:
    """Raise an InputError if the :func:`stamp` of the files differs from ``before``."""
    try:
        unchanged = stamp(paths)[0] == before
    except OSError:
        unchanged = False
    if not unchanged:
        raise InputError(
            f"{name} changed while it was read. Wait until it is complete, and run the same command again."
        )
