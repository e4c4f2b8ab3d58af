"""Repeats what fails on the way to a server, and says in words what went wrong in the end."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from evalkit.errors import EvalkitError, RemoteError, brief
from evalkit.system.connection import PASSING
from evalkit.system.urls import scrubbed

__all__ = ["WAITS", "ShortRead", "persist"]

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between two attempts."""

_PASSING = re.compile("Connect|Disconnect|Timeout|Payload")
_COPY = "Copy the file to this machine first, and give the copy."


class ShortRead(Exception):
    """Fewer bytes came than were asked for."""


def persist(name: str, call: Callable[[], T], *, patient: bool = True) -> T:
    """Return what ``call`` returns, after some attempts if need be.

    Args:
        name: The URL, as messages show it.
        call: Asks the server.
        patient: Whether to try again.

    Raises:
        RemoteError: It never succeeded; the message says why, without credentials.
    """
    for wait in (*(WAITS if patient else ()), None):
        try:
            return call()
        except EvalkitError:
            raise
        except Exception as error:  # every file system of fsspec raises what its library does
            reason, final = _reason(error)
        if final or wait is None:
            # Not "from error": a traceback would show the URL with its credentials.
            raise RemoteError(f"{name}: {reason}") from None
        time.sleep(wait)
    raise AssertionError("unreachable")


def _reason(error: BaseException) -> tuple[str, bool]:
    """What went wrong, in words; and whether another attempt would fail as well."""
    chain = list(_chain(error))
    for link in chain:
        status = getattr(link, "status", None) or getattr(link, "code", None)
        if isinstance(status, int) and 400 <= status < 600:
            return _of_status(status)
    # fsspec takes any failure to look at a URL for a missing file; the true reason is its cause.
    root = chain[-1] if type(error) is FileNotFoundError else error
    detail = brief(scrubbed(f"{type(root).__name__}: {root}"), 200)
    if "range requests" in str(root):
        return (
            "the server sends only whole files: it ignores requests for a range of bytes, by which larger "
            f"files are read. {_COPY}"
        ), True
    if isinstance(root, FileNotFoundError) or "NoSuch" in type(root).__name__:
        return "there is no such file or folder", True
    if isinstance(root, PermissionError) or "Credential" in type(root).__name__:
        return f"no permission to read it, or no credentials ({detail}). Log in, or check its address", True
    if isinstance(root, TimeoutError):
        return "the server does not answer; it was tried several times. Try again later", False
    if isinstance(root, ShortRead):
        return f"the connection broke off or the file changed: {root}. Run the same command again", False
    # Not all libraries derive errors of connections from OSError.
    final = not isinstance(root, OSError) and not _PASSING.search(type(root).__name__)
    return f"cannot be read ({detail}). Check its address and your connection, and try again", final


def _of_status(status: int) -> tuple[str, bool]:
    if status in (404, 410):
        return f"there is no such file or folder (the server answered {status})", True
    if status in (401, 403, 407):
        return (
            f"no permission to read it (the server answered {status}). Log in, or check its address; a "
            "signed address may have expired"
        ), True
    if status == 412:
        return "changed while it was read. Wait until it is complete, and run the same command again", True
    passing = status >= 500 or status in PASSING
    return f"the server answered {status}{'; it was tried several times' if passing else ''}", not passing


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__
