"""Repeats what fails on the way to a server, and says in words what went wrong in the end."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from evalkit.errors import EvalkitError, OutputError, RemoteError, brief
from evalkit.system.connection import PASSING
from evalkit.system.stops import current_stop, pause
from evalkit.system.urls import scrubbed

__all__ = ["WAITS", "Changed", "Garbled", "NoRanges", "ShortRead", "is_forbidden", "persist"]

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between two attempts."""

_PASSING = re.compile("Connect|Disconnect|Timeout|Payload")
_CHANGED = "changed while it was read. Wait until it is complete, and run the same command again"
_COPY = "Download the file first and give the local path."
_NO_CONNECTION = re.compile("Connect(ion)?Timeout")
_CONNECTION_ATTEMPTS = 2
_LONGEST = 300.0
"""Seconds after which no attempt begins."""
_QUIET = 30.0
"""Seconds between two messages that something is tried again."""

_log = logging.getLogger(__name__)
_said = -_QUIET
_said_lock = threading.Lock()


class ShortRead(Exception):
    """Fewer bytes came than were asked for."""


class Changed(Exception):
    """The file is not the one that was opened."""


class NoRanges(Exception):
    """The server sends the whole file where a range was asked for."""


class Garbled(Exception):
    """The server sends something else than was asked for."""


def persist(name: str, call: Callable[[], T], *, patient: bool = True, writing: bool = False) -> T:
    """Return what ``call`` returns, after some attempts if need be.

    Args:
        name: The URL, as messages show it.
        call: Asks the server.
        patient: Whether to try again.
        writing: Whether the call writes there, and does not read.

    Raises:
        RemoteError: It never succeeded; the message says why, without credentials.
        OutputError: The same, where it writes.
    """
    begun = time.monotonic()
    for attempt, wait in enumerate((*(WAITS if patient else ()), None), 1):
        try:
            return call()
        except EvalkitError:
            raise
        except Exception as error:  # every file system of fsspec raises what its library does
            reason, final = _reason(error, "write" if writing else "read")
            if any(_NO_CONNECTION.search(type(link).__name__) for link in _chain(error)):
                final = attempt >= _CONNECTION_ATTEMPTS
        if not final and wait is not None and time.monotonic() - begun < _LONGEST:
            _say(name)
            pause(wait)
            if not ((stop := current_stop()) and stop.is_set()):
                continue
        # Not "from error": a traceback would show the URL with its credentials.
        if writing:
            raise OutputError(f"Cannot write {name}: {reason}") from None
        raise RemoteError(f"{name}: {reason}") from None
    raise AssertionError("unreachable")


def _say(name: str) -> None:
    """Say that it takes longer; not for each of many requests at a time."""
    global _said
    with _said_lock:
        if time.monotonic() - _said < _QUIET:
            return
        _said = time.monotonic()
    _log.info("%s: no answer yet, trying again", name)


def is_forbidden(error: BaseException) -> bool:
    """Whether the server knows us and refuses."""
    # gcsfs has no class of its own for it.
    return isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")


def _reason(error: BaseException, verb: str) -> tuple[str, bool]:
    """What went wrong when we wanted to read or write; and whether another attempt would fail as well."""
    chain = list(_chain(error))
    for link in chain:
        status = getattr(link, "status", None) or getattr(link, "code", None)
        if isinstance(status, int) and 400 <= status < 600:
            return _of_status(status, verb)
    # fsspec takes any failure to look at a URL for a missing file; the true reason is its cause.
    root = chain[-1] if type(error) is FileNotFoundError else error
    detail = brief(scrubbed(f"{type(root).__name__}: {root}"), 200)
    if isinstance(root, NoRanges):
        return (
            "the server ignores range requests, which are needed for larger files, and always sends the "
            f"whole file. {_COPY}"
        ), True
    if isinstance(root, Changed):
        return _CHANGED, True
    if isinstance(root, Garbled):
        return f"the server sent something else than was asked for: {root}. {_COPY}", False
    if isinstance(root, FileNotFoundError) or "NoSuch" in type(root).__name__:
        return f"there is no such {'file' if verb == 'read' else 'bucket'} or folder", True
    if is_forbidden(root) or "Credential" in type(root).__name__:
        return f"no permission to {verb} it, or no credentials ({detail}). Log in, or check the URL", True
    if isinstance(root, TimeoutError):
        return "the server did not answer after several attempts. Try again later", False
    if isinstance(root, ShortRead):
        return f"the connection was lost or the file changed: {root}. Run the same command again", False
    # Not all libraries derive errors of connections from OSError.
    final = not isinstance(root, OSError) and not _PASSING.search(type(root).__name__)
    what = "cannot be read" if verb == "read" else "it failed"
    return f"{what} ({detail}). Check the URL and your connection, and try again", final


def _of_status(status: int, verb: str) -> tuple[str, bool]:
    if status in (404, 410):
        return f"there is no such file or folder (the server answered {status})", True
    if status in (401, 403, 407):
        return (
            f"no permission to {verb} it (the server answered {status}). Log in, or check the URL; a "
            "signed URL may have expired"
        ), True
    if status == 412:
        return _CHANGED, True
    passing = status >= 500 or status in PASSING
    if passing:
        return f"the server still answered {status} after several attempts", False
    return f"the server answered {status}", True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__
