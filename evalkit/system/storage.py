"""Location of an input: a path on this machine, or a URL that is read in ranges with fsspec.

::

    place = place_of("s3://bucket/samples.npz")  # a Remote; a Path for a local file, without loading fsspec
    with file_or_path(place) as file, zipfile.ZipFile(file) as archive:
        ...

:class:`Remote` has the path methods that image readers use. Its string, shown in messages and reports, leaves
out user and password, and the query of the URL, which may be a signature.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias
from urllib.parse import unquote, urlsplit

from evalkit.errors import InputError, RemoteError
from evalkit.system.file_systems import HTTP, SCHEMES, TAGS, TIMES, file_system, version_of
from evalkit.system.urls import after_host, is_offline, is_url, scheme_of, shown, without_query

__all__ = ["Place", "Remote", "file_or_path", "listed", "matching", "place_of", "size_of"]

_THIS_MACHINE = ("file", "memory")
_OBJECT_STORES = ("s3", "gs", "gcs")

_MOST_LEVELS = 32
_MOST_FOLDERS = 100_000

_KEPT_KEYS = ("type", "size", "ino", *TAGS, *TIMES)
# File systems and servers store times with a resolution of up to 2 s; see evalkit.system.identity.
_SETTLED_SECONDS = 2.0
# These change with every new signature of the same file.
_SIGNATURE = re.compile(r"(?i)x-(amz|goog)-")


class Remote:
    """A file or folder at a URL.

    Attributes:
        url: The URL as given, which may contain credentials. Use ``str()`` in messages.

    Raises:
        InputError: evalkit does not support this type of URL.
        MissingDependencyError: The package for it is not installed.
        RemoteError: ``EVALKIT_OFFLINE`` is set.
    """

    def __init__(self, url: str, listed: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self.scheme = scheme_of(url)
        if self.scheme not in SCHEMES:
            raise InputError(
                f"{shown(url)}: evalkit does not read URLs of this kind; expected one that begins with "
                f"{', '.join(f'{scheme}://' for scheme in SCHEMES)}"
            )
        if is_offline() and self.scheme not in _THIS_MACHINE:
            raise RemoteError(
                f"{self}: EVALKIT_OFFLINE forbids using the network. Unset it, or give a local copy."
            )
        self._file_system()  # so that a missing package is reported first
        # A listing may give versions and times in a different form or precision than the file's own entry, so
        # the two are not compared.
        self._listed = listed
        self._info: Mapping[str, Any] | None = None
        self._members: dict[str, Remote] | None = None
        self._token = uuid.uuid4().hex

    def __str__(self) -> str:
        return shown(self.url)

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_token": uuid.uuid4().hex}

    def _file_system(self) -> Any:
        # Parts that are already escaped, such as the query of a signed URL, are sent unchanged.
        is_escaped = self.url.isascii() and " " not in self.url
        return file_system(self.scheme, os.getpid(), is_escaped and self.scheme in HTTP)

    @property
    def _path(self) -> str:
        """The path in the file system's form."""
        return str(self._file_system()._strip_protocol(self.url))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._text().rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Of :attr:`name`: ``.npz``."""
        return PurePosixPath(self.name).suffix

    def _text(self) -> str:
        """The URL written like a local path: unescaped, without a trailing slash."""
        text = self._bare.rstrip("/")
        return unquote(text) if self.scheme in HTTP else text

    @property
    def _bare(self) -> str:
        """The URL without its query."""
        return without_query(self.url)

    @property
    def identity(self) -> str:
        """The URL without credentials; the cache key of its content."""
        query = self.url.partition("?")[2] if self.scheme in HTTP else ""
        kept = "&".join(part for part in query.split("&") if part and not _SIGNATURE.match(part))
        if str(self).endswith("://..."):
            kept += f" {self._bare}"
        return f"{self}?{hashlib.sha256(kept.encode()).hexdigest()}" if kept else str(self)

    # ------------------------------------------------------------------------------------------ looking

    def is_dir(self) -> bool:
        """Whether it is a folder; over HTTP, whether the URL ends in a slash.

        Raises:
            RemoteError: It does not exist or is inaccessible.
        """
        if self.scheme in HTTP:
            return self._bare.endswith("/")
        return bool(self._known()["type"] == "directory")

    @property
    def size(self) -> int:
        """Size of the file in bytes.

        Raises:
            RemoteError: As :meth:`is_dir`, or the server does not say.
        """
        if (size := self._known().get("size")) is None:
            self._info = self._look()  # a listing may leave out the size
            size = self._info.get("size")
        if size is None:
            raise RemoteError(
                f"{self}: the server does not say how large the file is, so it cannot be read in ranges. "
                "Download the file first and give the local path."
            )
        return int(size)

    def _known(self) -> Mapping[str, Any]:
        if self._info is None:
            if self._listed is not None:
                return self._listed
            self._info = self._look()
        return self._info

    def _look(self) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            system = self._file_system()
            if self.scheme in HTTP:
                from evalkit.system.http_files import describe

                return describe(system, self._path)
            system.invalidate_cache(self._path)
            return dict(system.info(self._path))

        found: dict[str, Any] = self._persist(look)
        return found

    def _persist(self, call: Callable[[], Any]) -> Any:
        from evalkit.system.attempts import persist

        return persist(str(self), call, patient=self.scheme not in _THIS_MACHINE)

    def stamp(self) -> tuple[str, float]:
        """Query a token that changes with the content, and the last change in seconds since 1970.

        The time is 0 if the server gives only a version, and infinite if changes cannot be detected. Files in
        a folder over HTTP are queried once, because each of their ranges is checked to be of this version.

        Raises:
            RemoteError: It is inaccessible, or has changed since it was opened.
        """
        if self.is_dir():
            versions = _versions(self.walk())
            return f"{self.identity} {versions}", max((time for *_, time in versions), default=float("inf"))
        now, before = self._look(), self._info
        version, changed = version_of(now)
        if before is not None and before.get("size") is not None and version_of(before)[0] != version:
            raise self._has_changed()
        return f"{self.identity} {version}", changed

    def shows_changes(self) -> bool:
        """Whether the server gives versions or times, for the file or for all files in the folder."""
        if self.is_dir():
            return all(math.isfinite(changed) for *_, changed in _versions(self._members or {}))
        return math.isfinite(version_of(self._known())[1])

    def _has_changed(self) -> RemoteError:
        return RemoteError(
            f"{self} changed while it was read. Wait until it is complete, and run the same command again."
        )

    @property
    def version(self) -> str:
        """Identifies the content when it was opened; unique to this object if the server gives no version."""
        version, changed = version_of(self._known())
        settled = changed < datetime.now().timestamp() - _SETTLED_SECONDS
        return f"{self.identity} {version if settled else self._token}"

    # ---------------------------------------------------------------------------------------- listing

    def walk(self) -> dict[str, Remote]:
        """All files in a folder, at any depth, as relative POSIX path and file, sorted by path.

        Raises:
            InputError: There are too many folders.
            RemoteError: It cannot be listed, or has changed since it was first listed.
        """
        found: dict[str, Remote] = {}
        pending, folders = [(self, 0)], 0
        while pending:
            folder, level = pending.pop()
            folders += 1
            if level > _MOST_LEVELS or folders > _MOST_FOLDERS:
                raise InputError(
                    f"{self}: holds folders more than {_MOST_LEVELS} levels deep, or more than "
                    f"{_MOST_FOLDERS:,}. The server may answer every URL with the same page"
                )
            for child, is_folder in folder._children(deep=self.scheme in _OBJECT_STORES):
                if is_folder:
                    pending.append((child, level + 1))
                else:
                    found[_relative(child, self)] = child
        found = dict(sorted(found.items()))
        if self._members is None:
            self._members = found
        elif listed(self._members) != listed(found):
            raise self._has_changed()
        return self._members  # reused, so that their metadata is not queried again

    def _children(self, *, deep: bool = False) -> list[tuple[Remote, bool]]:
        """Entries of a folder, and whether each is a folder; with ``deep``, all files below it."""

        def listed() -> list[dict[str, Any]]:
            system = self._file_system()
            if self.scheme in HTTP:
                from evalkit.system.http_files import links

                return [{"name": link} for link in links(system, self._path)]
            system.invalidate_cache()
            if deep:
                return list(system.find(self._path, detail=True).values())
            return list(system.ls(self._path, detail=True))

        children = []
        for info in self._persist(listed):
            path = str(info["name"])
            if self.scheme in HTTP:
                child = Remote(path)
                is_folder = child.is_dir()
            else:
                is_folder = info["type"] == "directory"
                if path.endswith("/") > is_folder:
                    continue
                url = str(self._file_system().unstrip_protocol(path))
                kept = {key: info[key] for key in _KEPT_KEYS if key in info}
                child = Remote(f"{url.rstrip('/')}/" if is_folder else url, kept)
            if (name := _relative(child, self)) and ".." not in name.split("/"):
                children.append((child, is_folder))
        return children

    # ---------------------------------------------------------------------------------------- reading

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open the file as a seekable stream; see :mod:`evalkit.system.ranges`."""
        from evalkit.system.ranges import open_ranges

        assert mode == "rb"
        return open_ranges(self)

    def fetch(self, start: int, end: int) -> bytes:
        """Exactly the bytes ``start`` to ``end`` (exclusive).

        Raises:
            RemoteError: They could not be read after several attempts.
        """
        from evalkit.system.attempts import ShortRead

        def read() -> bytes:
            system = self._file_system()
            if self.scheme in HTTP:
                from evalkit.system.http_files import read_range

                return read_range(system, self._path, start, end, self._known(), self.size)
            data = system.cat_file(self._path, start=start, end=end)
            if len(data) != end - start:
                raise ShortRead(f"{len(data):,} of {end - start:,} bytes came")
            return bytes(data)

        return bytes(self._persist(read)) if end > start else b""

    def read_bytes(self) -> bytes:
        """The whole file; check its size first."""
        return self.fetch(0, self.size)


Place: TypeAlias = Path | Remote
"""A file or folder on this machine or at a URL."""


def place_of(source: str | os.PathLike[str] | Remote) -> Place:
    """The location for a path or URL.

    Raises:
        InputError: As for :class:`Remote`; or a URL was given as a Path, which drops one of its slashes.
    """
    if isinstance(source, Remote):
        return source
    if is_url(source):
        return Remote(os.fspath(source))
    path = Path(source)
    if re.match(r"(https?|s3|gs|gcs):/", path.as_posix()) and not path.exists():
        raise InputError(
            f"{shown(path.as_posix().replace(':/', '://', 1))}: give a URL as text, not as a Path."
        )
    return path


@contextmanager
def file_or_path(place: Place) -> Iterator[Any]:
    """The path if it is local, or a file object for a URL, for libraries that accept both."""
    if isinstance(place, Remote):
        with place.open() as file:
            yield file
    else:
        yield place


def size_of(place: Place) -> int:
    """Size of a file in bytes."""
    return place.size if isinstance(place, Remote) else place.stat().st_size


def matching(pattern: str) -> list[Remote]:
    """The files and folders at URLs that match a pattern, sorted by name.

    Raises:
        InputError: As for :class:`Remote`, or the pattern is not supported over HTTP.
    """
    folder, _, last = pattern.rpartition("/")
    is_web = scheme_of(pattern) in HTTP
    if not (re.search(r"[*[]", after_host(f"{folder}/")) if is_web else re.search(r"[*[?]", folder)):
        children = Remote(f"{folder}/")._children()
        # Each is opened separately, without the listing's metadata.
        found = [Remote(child.url) for child, _ in children if fnmatchcase(child.name, last)]
    elif is_web:
        raise InputError(f"{shown(pattern)}: over HTTP only the last part of a URL may be a pattern")
    else:
        root = Remote(pattern)
        paths = root._persist(lambda: root._file_system().glob(root._path))
        found = [Remote(root._file_system().unstrip_protocol(path)) for path in paths]
    hidden = last.startswith(".")
    return sorted((child for child in found if hidden or not child.name.startswith(".")), key=Remote._text)


def _relative(child: Remote, folder: Remote) -> str:
    """Relative POSIX path; special characters are escaped in HTTP listings."""
    if child.scheme in HTTP:
        path, base = (unquote(urlsplit(place._bare).path) for place in (child, folder))
    else:
        path, base = child._path, folder._path
    inside = path.removeprefix(base.rstrip("/")).strip("/")
    return str(PurePosixPath(inside)) if inside else ""


def listed(members: Mapping[str, Remote]) -> list[tuple[str, str]]:
    """Names of files, and their versions according to the listing."""
    return [(name, version_of(child._listed or {})[0]) for name, child in members.items()]


def _versions(members: Mapping[str, Remote]) -> list[tuple[str, str, float]]:
    """Names of files and their versions; a version that is not in the listing is queried."""
    from evalkit.system.ranges import fetch_each

    def version(item: tuple[str, Remote]) -> tuple[str, str, float]:
        try:
            return item[0], *version_of(item[1]._known())
        except RemoteError:  # a broken link, perhaps not to an image
            return item[0], "", float("inf")

    is_known = all(child._info or child._listed for child in members.values())
    return list((map if is_known else fetch_each)(version, members.items()))
