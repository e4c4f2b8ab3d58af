"""A single HTTP connection of a download: the request, the server's metadata of the file, and its bytes."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse

__all__ = ["LONGEST_WAIT", "Answer", "Failure", "Version", "ask", "next_block"]

LONGEST_WAIT = 60.0
"""Seconds between two connections, at most."""

BLOCK = 2**18
# Client errors that may be temporary; any other 4xx is final.
PASSING = (408, 425, 429)


class Failure(Exception):
    """A connection failed to deliver the file; ``final`` if retrying would not help."""

    def __init__(self, message: str, *, final: bool = False, wait: float = 0.0) -> None:
        super().__init__(message)
        self.final = final
        self.wait = wait


@dataclass(frozen=True)
class Version:
    """A server's metadata of a file. A partial file is the beginning of one version."""

    url: str
    size: int | None
    etag: str | None
    modified: str | None

    @property
    def condition(self) -> str | None:
        """Value of the If-Range header, which must not be a weak tag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def differs_from(self, other: Version) -> bool:
        """Whether the two must have different content. Fields that a server leaves out are not compared."""
        names = ("size", "etag", "modified") if self.url == other.url else ("size",)
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)


@dataclass(frozen=True)
class Answer:
    """An open connection that delivers the file, or the rest of it, from byte ``start``."""

    response: HTTPResponse
    start: int
    version: Version

    @classmethod
    def read(cls, url: str, response: HTTPResponse) -> Answer:
        """Read the headers; ``start`` is -1 for a partial response that does not state where it begins."""
        start, size = 0, response.headers.get("Content-Length", "")
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
            start, size = (int(span[1]), span[3]) if span else (-1, "")
            if span and size == "*":  # the rest of the file was requested, so this is its last byte
                size = str(int(span[2]) + 1)
        version = Version(
            url=url,
            size=int(size) if size.isdecimal() else None,
            etag=response.headers.get("ETag"),
            modified=response.headers.get("Last-Modified"),
        )
        return cls(response, start, version)


def ask(url: str, start: int, known: Version | None, timeout: float) -> Answer | None:
    """Connect; None if the server cannot continue from byte ``start``."""
    if not url.startswith(("http://", "https://")):
        raise Failure("expected an address that begins with http:// or https://", final=True)
    headers = {"User-Agent": "evalkit"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if known is not None and known.url == url and known.condition:
            headers["If-Range"] = known.condition
    try:
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return None
        wait = error.headers.get("Retry-After", "")
        raise Failure(
            f"the server answered {error.code} {error.reason}",
            final=error.code < 500 and error.code not in PASSING,
            wait=min(float(wait), LONGEST_WAIT) if wait.isdecimal() else 0.0,
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise Failure(f"no connection: {getattr(error, 'reason', error)}") from error
    answer = Answer.read(url, response)
    if response.status == 200:
        return answer
    same = known is None or not answer.version.differs_from(known)
    if response.status == 206 and answer.start == start > 0 and same:
        return answer
    response.close()
    if start:
        return None
    raise Failure(f"the server answered {response.status} {response.reason}, expected 200", final=True)


def next_block(response: HTTPResponse) -> bytes | None:
    """The next bytes; empty at the end, None if the connection is lost."""
    try:
        # read() would wait for the whole block, and lose it if the connection breaks.
        return response.read1(BLOCK)
    except (OSError, HTTPException):
        return None
