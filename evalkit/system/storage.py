"""Where an input is: a path on this machine, or a URL that fsspec reads by ranges.

::

    place = place_of("s3://bucket/samples.npz")  # a Remote; a Path for a local file, without loading fsspec
    with file_or_path(place) as file, zipfile.ZipFile(file) as archive:
        ...

:class:`Remote` has those methods of a path that the readers of images use. Its text, which messages and
reports show, has neither user and password nor the query of the URL, which may be a signature.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias
from urllib.parse import unquote

from evalkit.errors import InputError, MissingDependencyError, RemoteError
from evalkit.system.urls import is_url, scheme_of, shown

__all__ = ["Place", "Remote", "file_or_path", "matching", "place_of", "size_of"]

# Scheme: the package that fsspec needs for it.
SCHEMES = {
    "https": "aiohttp",
    "http": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "file": None,
    "memory": None,
}
_HTTP = ("http", "https")
_THIS_MACHINE = ("file", "memory")
_OBJECT_STORES = ("s3", "gs", "gcs")

_TIMEOUT = 30.0
"""Seconds without an answer or a byte after which a connection is given up."""

# Under these names fsspec's file systems say which version of a file is there.
_TAGS = ("ETag", "etag", "generation", "VersionId")
_TIMES = ("Last-Modified", "LastModified", "updated", "mtime", "created")
_KEPT_KEYS = ("type", "size", "ino", *_TAGS, *_TIMES)
# File systems and servers keep times in steps of up to 2 s; see evalkit.system.identity.
_SETTLED_SECONDS = 2.0
# Change with every signature of the same file.
_SIGNATURE = re.compile(r"(?i)x-(amz|goog)-")


class Remote:
    """A file or folder at a URL.

    Attributes:
        url: The URL as it was given, which may hold credentials. For messages use ``str()``.

    Raises:
        InputError: The URL is of a kind that evalkit does not read.
        MissingDependencyError: Its package is not installed.
        RemoteError: ``EVALKIT_OFFLINE`` is set.
    """

    def __init__(self, url: str, info: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self.scheme = scheme_of(url)
        if self.scheme not in SCHEMES:
            raise InputError(
                f"{shown(url)}: evalkit does not read URLs of this kind; expected one that begins with "
                f"{', '.join(f'{scheme}://' for scheme in SCHEMES)}"
            )
        from evalkit.system.download import is_offline  # here, so that local files load nothing of networks

        if is_offline() and self.scheme not in _THIS_MACHINE:
            raise RemoteError(
                f"{self}: EVALKIT_OFFLINE forbids using the network. Unset it, or give a copy on this "
                "machine."
            )
        self._file_system()  # so that a missing package is said first
        self._info = info
        self._token = uuid.uuid4().hex

    def __str__(self) -> str:
        return shown(self.url)

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_token": uuid.uuid4().hex}

    def _file_system(self) -> Any:
        # What is escaped already, as the query of a signed URL has to be, is sent as it is.
        is_escaped = self.url.isascii() and " " not in self.url
        return _file_system(self.scheme, os.getpid(), is_escaped and self.scheme in _HTTP)

    @property
    def _path(self) -> str:
        """The path as the file system wants it."""
        return str(self._file_system()._strip_protocol(self.url))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._text().rpartition("/")[2]

    def _text(self) -> str:
        """The address as a local path would be written: nothing escaped, no slash at the end."""
        text = str(self).rstrip("/")
        return unquote(text) if self.scheme in _HTTP else text

    @property
    def identity(self) -> str:
        """The address without credentials, under which its content is remembered."""
        query = self.url.partition("?")[2] if self.scheme in _HTTP else ""
        kept = "&".join(part for part in query.split("&") if part and not _SIGNATURE.match(part))
        return f"{self}?{hashlib.sha256(kept.encode()).hexdigest()}" if kept else str(self)

    # ------------------------------------------------------------------------------------------ looking

    def is_dir(self) -> bool:
        """Whether it is a folder; over HTTP, whether the URL ends in a slash.

        Raises:
            RemoteError: There is nothing, or it cannot be looked at.
        """
        if self.scheme in _HTTP:
            return shown(self.url).endswith("/")
        return bool(self._known()["type"] == "directory")

    @property
    def size(self) -> int:
        """Bytes of the file.

        Raises:
            RemoteError: As :meth:`is_dir`, or the server does not say.
        """
        if (size := self._known().get("size")) is None:
            self._info = self._look()  # a listing may leave out what the file itself has
            size = self._info.get("size")
        if size is None:
            raise RemoteError(
                f"{self}: the server does not say how large the file is, so it cannot be read by ranges. "
                "Copy it to this machine first, and give the copy."
            )
        return int(size)

    def _known(self) -> Mapping[str, Any]:
        if self._info is None:
            self._info = self._look()
        return self._info

    def _look(self) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            system = self._file_system()
            system.invalidate_cache(self._path)
            return dict(system.info(self._path))

        found: dict[str, Any] = self._persist(look)
        return found

    def _persist(self, call: Callable[[], Any]) -> Any:
        from evalkit.system.attempts import persist

        return persist(str(self), call, patient=self.scheme not in _THIS_MACHINE)

    def stamp(self) -> tuple[str, float]:
        """What changes when the content does, asked anew; and when it changed last, in seconds since 1970.

        The time is 0 where the server gives a version, and infinite where nothing would show a change.

        Raises:
            RemoteError: It cannot be looked at, or is not what it was when it was opened.
        """
        if self.is_dir():
            found = [(name, *_version(child._info or {})) for name, child in self.walk()]
            text = f"{self.identity} {[(name, version) for name, version, _ in found]}"
            return text, max((changed for *_, changed in found), default=float("inf"))
        now, before = self._look(), self._info
        version, changed = _version(now)
        if before is not None and before.get("size") is not None and _version(before)[0] != version:
            raise RemoteError(
                f"{self} changed while it was read. Wait until it is complete, and run the same command "
                "again."
            )
        return f"{self.identity} {version}", changed

    @property
    def version(self) -> str:
        """Names what was there when it was opened; of this object alone, if the server gives no version."""
        version, changed = _version(self._known())
        settled = changed < datetime.now().timestamp() - _SETTLED_SECONDS
        return f"{self.identity} {version if settled else self._token}"

    # ---------------------------------------------------------------------------------------- listing

    def walk(self) -> list[tuple[str, Remote]]:
        """All files in a folder, at every depth: relative POSIX paths and files, sorted by path.

        Raises:
            RemoteError: It cannot be listed.
        """
        found: dict[str, Remote] = {}
        pending = [self]
        while pending:
            folder = pending.pop()
            for child, is_folder in folder._children(deep=self.scheme in _OBJECT_STORES):
                if is_folder:
                    pending.append(child)
                else:
                    found[_relative(child, self)] = child
        return sorted(found.items())

    def _children(self, *, deep: bool = False) -> list[tuple[Remote, bool]]:
        """What is in a folder, and whether it is a folder itself; with ``deep`` all files below."""

        def listed() -> list[dict[str, Any]]:
            system = self._file_system()
            system.invalidate_cache()
            if deep:
                return list(system.find(self._path, detail=True).values())
            return list(system.ls(self._path, detail=True))

        children = []
        for info in self._persist(listed):
            path, is_folder = str(info["name"]), info["type"] == "directory"
            # Over HTTP a listing is a web page, with links to itself in another order.
            if (self.scheme in _HTTP and "?" in path) or path.endswith("/") > is_folder:
                continue
            url = path if self.scheme in _HTTP else self._file_system().unstrip_protocol(path)
            kept = {key: info[key] for key in _KEPT_KEYS if key in info}
            child = Remote(f"{url.rstrip('/')}/" if is_folder else url, kept)
            if (name := _relative(child, self)) and ".." not in name.split("/"):
                children.append((child, is_folder))
        return children

    # ---------------------------------------------------------------------------------------- reading

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The file, to be read and sought; see :mod:`evalkit.system.ranges`."""
        from evalkit.system.ranges import open_ranges

        assert mode == "rb"
        return open_ranges(self)

    def fetch(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to before ``end``, no fewer.

        Raises:
            RemoteError: They cannot be had, also not after several attempts.
        """
        from evalkit.system.attempts import ShortRead

        def read() -> bytes:
            system = self._file_system()
            if self.scheme in _HTTP:
                # Unlike cat_file, this notices a server that sends the whole file.
                headers = dict(system.kwargs.get("headers", {}))
                if (tag := str(self._known().get("ETag") or "W/")) and not tag.startswith("W/"):
                    headers["If-Match"] = tag
                with system.open(self._path, size=self.size, cache_type="none", headers=headers) as file:
                    file.seek(start)
                    data = file.read(end - start)
            else:
                data = system.cat_file(self._path, start=start, end=end)
            if len(data) != end - start:
                raise ShortRead(f"{len(data):,} of {end - start:,} bytes came")
            return bytes(data)

        return bytes(self._persist(read)) if end > start else b""

    def read_bytes(self) -> bytes:
        """The whole file; check its size before."""
        return self.fetch(0, self.size)


Place: TypeAlias = Path | Remote
"""A file or folder on this machine or at a URL."""


def place_of(source: str | os.PathLike[str] | Remote) -> Place:
    """Where a path or URL leads.

    Raises:
        InputError: As :class:`Remote`; or a URL was made a Path, which drops one of its slashes.
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
    """What a library opens that takes both: the path on this machine, or a file object for a URL."""
    if isinstance(place, Remote):
        with place.open() as file:
            yield file
    else:
        yield place


def size_of(place: Place) -> int:
    """Bytes of a file."""
    return place.size if isinstance(place, Remote) else place.stat().st_size


def matching(pattern: str) -> list[Remote]:
    """The files and folders at URLs that match a pattern, sorted by name.

    Raises:
        InputError: As :class:`Remote`, or it is a pattern that cannot be followed over HTTP.
    """
    folder, _, last = pattern.rpartition("/")
    if not re.search(r"[*[?]" if scheme_of(pattern) not in _HTTP else r"[*[]", folder):
        found = [child for child, _ in Remote(f"{folder}/")._children() if fnmatchcase(child.name, last)]
    elif scheme_of(pattern) in _HTTP:
        raise InputError(f"{shown(pattern)}: over HTTP only the last part of a URL may be a pattern")
    else:
        root = Remote(pattern)
        paths = root._persist(lambda: root._file_system().glob(root._path))
        found = [Remote(root._file_system().unstrip_protocol(path)) for path in paths]
    hidden = last.startswith(".")
    return sorted((child for child in found if hidden or not child.name.startswith(".")), key=Remote._text)


def _relative(child: Remote, folder: Remote) -> str:
    """Relative POSIX path; names in HTTP's listings have their special characters escaped."""
    path, base = (re.sub("^https?://", "", place._path).rstrip("/") for place in (child, folder))
    inside = path.removeprefix(base).lstrip("/")
    return str(PurePosixPath(unquote(inside) if child.scheme in _HTTP else inside)) if inside else ""


def _version(info: Mapping[str, Any]) -> tuple[str, float]:
    """Size, tag and times as text; and the time of the last change, as :meth:`Remote.stamp` gives it."""
    tags = [str(info[key]) for key in _TAGS if info.get(key) not in (None, "", "null")]
    times = [_seconds(info[key]) for key in _TIMES if info.get(key) is not None]
    # A weak tag stands for a meaning and not for bytes.
    is_exact = any(not tag.startswith("W/") for tag in tags)
    changed = 0.0 if is_exact else max(times, default=float("inf"))
    return str((info.get("size"), tags, times, info.get("ino"))), changed


def _seconds(time: Any) -> float:
    """A time as seconds since 1970; infinite if it is none, so that it proves nothing."""
    from email.utils import parsedate_to_datetime

    try:
        if isinstance(time, str):
            time = parsedate_to_datetime(time) if "," in time else datetime.fromisoformat(time)
        return float(time.timestamp() if isinstance(time, datetime) else time)
    except (ValueError, TypeError):
        return float("inf")


@functools.lru_cache
def _file_system(scheme: str, process: int, encoded: bool) -> Any:  # noqa: ARG001 - one of its own after a fork
    """The file system of fsspec for a scheme."""
    try:
        import fsspec
        from fsspec.config import conf
    except ImportError:
        raise MissingDependencyError(
            f"{scheme}:// URLs are read with fsspec, which is not installed: pip install 'evalkit[remote]'"
        ) from None
    try:
        options: dict[str, Any] = {}
        if scheme in _HTTP:
            options["encoded"] = encoded
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
            user = conf.get(scheme, {})  # what the user set for fsspec
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True} | user.get("client_kwargs", {})
            options["headers"] = {"Accept-Encoding": "identity"} | user.get("headers", {})
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        raise MissingDependencyError(
            f"{scheme}:// URLs are read with {SCHEMES[scheme]}, which is not installed: "
            "pip install 'evalkit[remote]'"
        ) from None
