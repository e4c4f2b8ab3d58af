"""The fsspec file system for a URL, and the version of a file that it reports."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from evalkit.errors import MissingDependencyError

__all__ = ["HTTP", "SCHEMES", "TAGS", "TIMES", "file_system", "version_of"]

# URL scheme: package that fsspec needs for it.
SCHEMES = {
    "https": "aiohttp",
    "http": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "file": None,
    "memory": None,
}
HTTP = ("http", "https")

# Names under which fsspec's file systems report the version of a file.
TAGS = ("ETag", "etag", "generation", "VersionId")
TIMES = ("Last-Modified", "LastModified", "updated", "mtime", "created")


@functools.lru_cache
def file_system(scheme: str, process: int, encoded: bool) -> Any:  # noqa: ARG001 - a new one after a fork
    """The fsspec file system for a scheme."""
    try:
        import fsspec
    except ImportError:
        raise MissingDependencyError(
            f"{scheme}:// URLs are read with fsspec, which is not installed: pip install 'evalkit[remote]'"
        ) from None
    try:
        options: dict[str, Any] = {}
        if scheme in HTTP:
            from evalkit.system import http_files

            options = http_files.options(scheme, encoded)
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        raise MissingDependencyError(
            f"{scheme}:// URLs are read with {SCHEMES[scheme]}, which is not installed: "
            "pip install 'evalkit[remote]'"
        ) from None


def version_of(info: Mapping[str, Any]) -> tuple[str, float]:
    """Size, tag and times as text; and the time of the last change, in seconds since 1970.

    The time is 0 if the server gives an exact version only, and infinite if changes cannot be detected.
    """
    tags = [str(info[key]) for key in TAGS if info.get(key) not in (None, "", "null")]
    times = [_seconds(info[key]) for key in TIMES if info.get(key) is not None]
    # A weak tag identifies equivalent content, not identical bytes.
    is_exact = any(not tag.startswith("W/") for tag in tags)
    if is_exact:  # an unreadable time does not matter then
        times = [time for time in times if math.isfinite(time)]
    # A tag may consist of only size and time in seconds, so such a recent file may still change unnoticed.
    changed = max(times, default=0.0 if is_exact else float("inf"))
    return str((info.get("size"), tags, times, info.get("ino"))), changed


def _seconds(time: Any) -> float:
    """A time as seconds since 1970; infinite if it is invalid, so that changes count as undetectable."""
    from email.utils import parsedate_to_datetime

    try:
        if isinstance(time, str):
            time = parsedate_to_datetime(time) if "," in time else datetime.fromisoformat(time)
        return float(time.timestamp() if isinstance(time, datetime) else time)
    except (ValueError, TypeError):
        return float("inf")
