"""Published batches on this machine: fetched once, checked against the catalog, and kept.

::

    path = fetch("imagenet256")  # from the cache, or downloaded

Their sizes and digests were not published. So the first fetch reads the whole file, checks it against the
catalog and writes its digest to ``<file>.json``; from then on the file must have this digest. So it is with
statistics of other tools, too, unless a public repository tells git's digest of them: then the first download
has to have that. Those without a direct address the user gets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

from evalkit.errors import DownloadError, InputError, OutputError, nearest
from evalkit.features.other_tools import read_rows
from evalkit.images import is_pattern, open_images
from evalkit.system.download import Download, download, file_sha256
from evalkit.system.files import cache_directory, replace_atomically
from evalkit.system.progress import Progress
from evalkit.system.urls import is_offline, is_url
from reference_batches.catalog import Entry, closest, find, published_files
from reference_batches.statistics import StatisticsFile, statistics_files

__all__ = ["cache_path", "fetch", "named"]

MOST_BESIDE = 10_000
"""Maximum number of names in a folder that are compared with a mistyped one."""

_log = logging.getLogger(__name__)


def fetch(
    name: str,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the file of a published batch; it is downloaded unless it is there.

    A file that was put there by hand is used as well, once it has been checked. What is about to take time is
    logged as information.

    Args:
        name: As in the catalog, for example ``imagenet256``.
        out: Path of the file; in the cache folder ``reference_batches`` if None.
        progress: Called with (the file's name, bytes so far, bytes in all) during the download.

    Raises:
        DownloadError: It could not be fetched, ``EVALKIT_OFFLINE`` is set, or a person has to get it.
        InputError: There is no such batch, or the file does not match the catalog.
        OutputError: It cannot be written, or there is not enough disk space.
    """
    published = statistics_files().get(name) or find(name)
    file = out or cache_path(published)
    if isinstance(published, StatisticsFile) and published.kind != "statistics":
        raise InputError(
            f"{name} names a file of the kind {published.kind}, with which nothing can be compared. It is at "
            f"{published.at}."
        )
    record = _Record.read(file)
    if record is not None and record.describes(file):
        return file
    if isinstance(published, StatisticsFile) and not published.urls:
        _check_there(published, file, record)

    def check(path: Path) -> None:
        if isinstance(published, StatisticsFile):
            _check_statistics(published, path)
        else:
            _log.info("%s: checking every image of %s", name, path)
            _check(published, path)

    if record is None and file.is_file():
        check(file)
    elif not is_offline():
        about = f"about {published.approximate_bytes / 1e9:.2g} GB " if isinstance(published, Entry) else ""
        _log.info("%s: %sfrom %s to %s", name, about, published.urls[0], file)
        if isinstance(published, StatisticsFile) and not published.git_blob and record is None:
            _log.info(
                "%s: no digest of this file was published. Its arrays are checked, and the digest of this "
                "first download, in %s.json beside it, has to stay.",
                name,
                file.name,
            )
    done = download(
        published.urls,
        file,
        sha256=None if record is None else record.sha256,
        max_bytes=published.max_bytes,
        progress=progress,
        check=check,
    )
    _Record.of(done).write(file)
    return file


def _check_there(row: StatisticsFile, file: Path, record: _Record | None) -> None:
    """Raise an error unless a file that has to be got by hand is there, and is used for the first time."""
    if not file.is_file():
        raise DownloadError(
            f"{row.name}: {row.file} is not on this machine. It is not downloaded, because it has no direct "
            f"address. Get it from {row.at}. Then give its path in place of the name, or save it as {file}."
        )
    if record is not None:
        raise InputError(
            f"{file} is not the file that was first used under the name {row.name}. Bring that back, or, to "
            f"accept this one, remove {file.name}.json beside it."
        )


def cache_path(entry: Entry | StatisticsFile) -> Path:
    """Path of a published file in the cache, whether it is there or not."""
    return cache_directory() / "reference_batches" / entry.file


def named(text: str) -> Entry | StatisticsFile | None:
    """Find the published file that an argument names; None for a path, a URL or a pattern.

    Raises:
        InputError: It is neither.
    """
    if is_url(text) or Path(text).exists() or is_pattern(text):
        return None
    if (entry := published_files().get(text)) is not None:
        return entry
    close = closest(text) or _files_like(Path(text))
    hint = f"did you mean {' or '.join(close)}?" if close else "`evalkit reference list` shows these."
    raise InputError(f"{text}: there is no such file or folder, and no published batch of this name; {hint}")


def _files_like(path: Path) -> list[str]:
    """Files and folders in the same folder with a similar name."""
    try:
        with os.scandir(path.parent) as found:
            # A name with unprintable characters was hardly meant, and could garble the message.
            names = [each.name for each in islice(found, MOST_BESIDE) if each.name.isprintable()]
    except (OSError, ValueError):  # a NUL byte in the path
        return []
    return [str(path.with_name(name)) for name in nearest(path.name, names, cutoff=0.75)]


@dataclass(frozen=True, kw_only=True)
class _Record:
    """Size, digest and time of a file that was fetched, written to ``<file>.json``."""

    sha256: str
    bytes: int
    changed: int
    """Time of the last change in nanoseconds; as long as it stays, the file is not read again."""

    @classmethod
    def of(cls, done: Download) -> Self:
        return cls(sha256=done.sha256, bytes=done.bytes, changed=done.path.stat().st_mtime_ns)

    @staticmethod
    def _path(file: Path) -> Path:
        return file.with_name(f"{file.name}.json")

    @classmethod
    def read(cls, file: Path) -> Self | None:
        try:
            return cls(**json.loads(cls._path(file).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, file: Path) -> None:
        with replace_atomically(self._path(file)) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    def describes(self, file: Path) -> bool:
        if not file.is_file() or file.stat().st_size != self.bytes:
            return False
        changed = file.stat().st_mtime_ns
        if changed != self.changed:
            if file_sha256(file) != self.sha256:
                return False
            with contextlib.suppress(OutputError):  # a read-only cache: the file is read again next time
                dataclasses.replace(self, changed=changed).write(file)
        return True


def _check(entry: Entry, path: Path) -> None:
    """Raise an InputError for a file that does not match the catalog, or is damaged anywhere."""
    images = open_images(path)
    expected = (entry.images, (entry.size, entry.size, 3), entry.kind == "reference")
    found = (len(images), images.shape, images.statistics is not None)
    if found != expected or (entry.labels and images.labels is None):
        raise InputError(
            f"{path} is not {entry.name} as it was published: expected {_words(*expected, entry.labels)}; "
            f"found {_words(*found, images.labels is not None)}"
        )
    for _ in images.batches(256):  # to its end, where the archive's checksum is compared
        pass


def _check_statistics(row: StatisticsFile, path: Path) -> None:
    """Raise an InputError for a file that is not what the catalog says, or holds no statistics."""
    if row.git_blob:
        content = path.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
        digest.update(content)
        if digest.hexdigest() != row.git_blob:
            raise InputError(
                f"{path} is not {row.file} as {row.users.partition(',')[0]} has it: git's digest of it is "
                f"{digest.hexdigest()}, expected {row.git_blob}"
            )
    if read_rows(path) is not None:
        return
    there = open_images(path).statistics or {}
    if not row.statistics or not row.statistics <= there.keys():
        found = ", ".join(there) or "no statistics"
        raise InputError(f"{path} holds {found}; expected {row.file}, with {row.keys}")


def _words(count: int, shape: tuple[int, int, int] | None, statistics: bool, labels: bool) -> str:
    size = "" if shape is None else f" of {shape[1]}x{shape[0]}"
    has = {True: "with", False: "without"}
    return f"{count:,} images{size} {has[labels]} labels, {has[statistics]} statistics"
