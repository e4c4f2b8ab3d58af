"""Outputs at URLs: a file of this machine becomes one object, which appears whole or not at all."""

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
"""Schemes at which objects can be written; a path is simpler than ``file://``."""


def check_destination(remote: Remote) -> None:
    """Check, before long work, that an object can be written, as far as can be told without writing it.

    Raises:
        OutputError: Nothing can be written there, the URL names no object, or there is no such bucket.
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
        except Exception as error:  # every file system of fsspec raises what its library does
            if not is_forbidden(error):  # some may write where they may not look
                raise

    if remote.scheme != "memory":
        persist(str(remote), look, writing=True)


def upload(file: Path, remote: Remote) -> None:
    """Put a file of this machine at a URL, in place of what is there.

    Raises:
        OutputError: It failed, even after several attempts. What was there before is unchanged.
    """
    system, path = _system_and_path(remote)
    persist(str(remote), lambda: system.put_file(str(file), path), writing=True)


def _system_and_path(remote: Remote) -> tuple[Any, str]:
    system = file_system(remote.scheme, os.getpid(), False)
    return system, str(system._strip_protocol(remote.url))
