"""Outputs at URLs: a local file is uploaded as one object, atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evalkit.errors import OutputError
from evalkit.system.attempts import is_forbidden, persist
from evalkit.system.file_systems import file_system
from evalkit.system.storage import Remote

__all__ = ["WRITABLE", "check_destination", "upload"]

WRITABLE = ("s3", "gs", "gcs", "memory")
"""URL schemes that support writing; for ``file://``, use a path."""


def check_destination(remote: Remote) -> None:
    """Check before long work that an object can be written, as far as possible without writing it.

    Raises:
        OutputError: Writing there is not supported, the URL names no object, or the bucket does not exist.
    """
    if remote.scheme not in WRITABLE:
        raise OutputError(f"{remote} cannot be written. Give s3://BUCKET/NAME, gs://BUCKET/NAME or a path.")
    system, path = _system_and_path(remote)
    bucket, _, key = path.strip("/").partition("/")
    if not key or remote.url.endswith("/"):
        raise OutputError(f"Cannot write {remote}: it is a folder. Give the name of a file.")

    def look() -> None:
        try:
            system.info(bucket)
        except FileNotFoundError:
            raise OutputError(
                f"Cannot write {remote}: there is no bucket {bucket}. Make it first, or check the URL."
            ) from None
        except Exception as error:  # fsspec's file systems raise the errors of their libraries
            if not is_forbidden(error):  # some users may write but not list
                raise

    if remote.scheme != "memory":
        persist(str(remote), look, writing=True)


def upload(file: Path, remote: Remote) -> None:
    """Upload a local file to a URL, replacing an existing object.

    Raises:
        OutputError: The upload failed after several attempts. An existing object is unchanged.
    """
    system, path = _system_and_path(remote)
    persist(str(remote), lambda: system.put_file(str(file), path), writing=True)


def _system_and_path(remote: Remote) -> tuple[Any, str]:
    system = file_system(remote.scheme, os.getpid(), False)
    return system, str(system._strip_protocol(remote.url))
