"""Retry failed requests to servers, and describe the final error in words."""

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
"""Seconds after which no further attempt is started."""
_QUIET = 30.0
"""Seconds between two messages about retries."""

_log = logging.getLogger(__name__)
_said = -_QUIET
_said_lock = threading.Lock()


class ShortRead(Exception):
    """The server sent fewer bytes than were requested."""


class Changed(Exception):
    """The file is not the one that was opened."""


class NoRanges(Exception):
    """The server sends the whole file when a range is requested."""


class Garbled(Exception):
    """The server sends something other than what was requested."""


def persist(name: str, call: Callable[[], T], *, patient: bool = True, writing: bool = False) -> T:
    """Return the result of ``call``, retrying if necessary.

    Args:
        name: The URL as shown in messages.
        call: Sends a request to the server.
        patient: Whether to retry.
        writing: Whether the call writes, rather than reads.

    Raises:
        RemoteError: Every attempt to read failed; the message says why, without credentials.
        OutputError: Every attempt to write failed.
    """
    begun = time.monotonic()
    for attempt, wait in enumerate((*(WAITS if patient else ()), None), 1):
        try:
            return call()
        except EvalkitError:
            raise
        except Exception as error:  # fsspec's file systems raise the errors of their libraries
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
    """Log that a request is retried, but not for each of many concurrent requests."""
    global _said
    with _said_lock:
        if time.monotonic() - _said < _QUIET:
            return
        _said = time.monotonic()
    _log.info("%s: no answer yet, trying again", name)


def is_forbidden(error: BaseException) -> bool:
    """Whether the server recognises the user but denies access."""
    # gcsfs has no specific class for this error.
    return isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")


def _reason(error: BaseException, verb: str) -> tuple[str, bool]:
    """What went wrong while reading or writing, and whether another attempt would fail, too."""
    chain = list(_chain(error))
    for link in chain:
        status = getattr(link, "status", None) or getattr(link, "code", None)
        if isinstance(status, int) and 400 <= status < 600:
            return _of_status(status, verb)
    # fsspec reports any failed lookup of a URL as a missing file; the actual error is its cause.
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
    # Not all libraries derive connection errors from OSError.
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
    """The error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__
