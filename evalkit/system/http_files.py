"""HTTP requests on fsspec's event loop and session: metadata of a file, ranges of it, links of a page.

fsspec itself accepts any 206 response as the requested bytes, and extracts links with a regular expression.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
from collections.abc import Coroutine, Mapping
from html.parser import HTMLParser
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from evalkit.errors import InputError
from evalkit.system.attempts import Changed, Garbled, NoRanges, ShortRead
from evalkit.system.stops import current_stop
from evalkit.system.urls import shown

__all__ = ["TIMEOUT", "describe", "links", "options", "read_range"]

T = TypeVar("T")

TIMEOUT = 30.0
"""Seconds without a response or a byte after which a connection is closed."""
_RANGE_SECONDS = 300.0
"""Maximum time for 8 MiB, however steadily the bytes arrive."""
_PAGE_BYTES = 2**26
_POLL = 0.2
_TAGS = ("ETag", "Last-Modified")
_PORTS = {"http": 80, "https": 443}


def options(scheme: str, encoded: bool) -> dict[str, Any]:
    """Options for fsspec's file system: evalkit's defaults, overridden by the user's fsspec settings."""
    import aiohttp
    from fsspec.config import conf

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    client: dict[str, Any] = {"timeout": timeout, "trust_env": True}
    headers = {"Accept-Encoding": "identity"}
    for each in sorted(_PORTS, key=lambda name: name == scheme):  # the scheme's own settings last
        client |= conf.get(each, {}).get("client_kwargs", {})
        headers |= conf.get(each, {}).get("headers", {})
    return {"encoded": encoded, "client_kwargs": client, "headers": headers}


def describe(system: Any, url: str) -> dict[str, Any]:
    """Size, tag and time of a file, if the server reports them."""

    async def ask() -> dict[str, Any]:
        session = await system.set_session()
        for request in (session.head, session.get):  # a URL may be signed for GET only
            settings = {"allow_redirects": True, **system.kwargs}
            async with request(system.encode_url(url), **settings) as answer:
                if request == session.head and answer.status >= 400:
                    continue
                answer.raise_for_status()
                found = {name: answer.headers[name] for name in _TAGS if name in answer.headers}
                if "Content-Length" in answer.headers and not _is_encoded(answer.headers):
                    return found | {"type": "file", "size": int(answer.headers["Content-Length"])}
        return found | {"type": "file", "size": None}

    return _run(system, ask(), 2 * _RANGE_SECONDS)


def read_range(system: Any, url: str, start: int, end: int, known: Mapping[str, Any], size: int) -> bytes:
    """Bytes ``start`` to ``end`` (exclusive) of a file that :func:`describe` described.

    Raises:
        Changed: The file has changed.
        NoRanges: The server sends the whole file.
        Garbled: The server sends something else.
        ShortRead: The server sends fewer bytes.
    """
    headers = {**system.kwargs.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    tag, time = str(known.get("ETag") or ""), known.get("Last-Modified")
    if tag and not tag.startswith("W/"):
        headers["If-Match"] = tag
    elif time:
        headers["If-Unmodified-Since"] = str(time)

    async def ask() -> bytes:
        session = await system.set_session()
        async with session.get(system.encode_url(url), **{**system.kwargs, "headers": headers}) as answer:
            if answer.status == 416:
                raise Changed
            answer.raise_for_status()
            _check(answer.status, answer.headers, start, end, known, size)
            data = bytearray()
            async for chunk in answer.content.iter_chunked(2**18):
                data += chunk
                if len(data) > end - start:
                    raise Garbled(f"more than the {end - start:,} bytes that were asked for")
        if len(data) < end - start:
            raise ShortRead(f"{len(data):,} of {end - start:,} bytes came")
        return bytes(data)

    return _run(system, ask(), _RANGE_SECONDS * max(1.0, (end - start) / 2**23))


def _check(
    status: int, headers: Mapping[str, str], start: int, end: int, known: Mapping[str, Any], size: int
) -> None:
    """Raise the errors of :func:`read_range` unless the response is the requested range of the same file."""
    tags = [str(each.get("ETag") or "").removeprefix("W/") for each in (headers, known)]
    times = [each.get("Last-Modified") for each in (headers, known)]
    pair = tags if all(tags) else times
    if all(pair) and pair[0] != pair[1]:
        raise Changed
    if _is_encoded(headers):
        raise Garbled("a compressed copy")
    if status == 200:
        if (start, end) != (0, size):
            raise NoRanges
        if int(headers.get("Content-Length", size)) != size:
            raise Changed
    elif status == 206:
        text = headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", text)
        if found is None or int(found[1]) != start or int(found[2]) >= end:
            raise Garbled(f"bytes {start}-{end - 1} were asked for, and {text[:80] or 'unnamed ones'} came")
        if found[3] not in ("*", str(size)):
            raise Changed
    else:
        raise Garbled(f"an answer {status}")


def _is_encoded(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Encoding", "").lower() not in ("", "identity")


def links(system: Any, url: str) -> list[str]:
    """Links of a page to locations below its URL, in order; links to folders end in a slash.

    Raises:
        InputError: The page is too large.
    """

    async def ask() -> str:
        session = await system.set_session()
        async with session.get(system.encode_url(url), **system.kwargs) as answer:
            answer.raise_for_status()
            if answer.headers.get("Content-Type", "text/html").partition(";")[0].strip().lower() not in (
                "text/html",
                "application/xhtml+xml",
            ):
                return ""
            page = bytearray()
            async for chunk in answer.content.iter_chunked(2**18):
                page += chunk
                if len(page) > _PAGE_BYTES:
                    raise InputError(
                        f"{shown(url)}: the page of links is larger than {_PAGE_BYTES >> 20} MiB. Put the "
                        "files into a zip or a tar"
                    )
            try:
                return page.decode(answer.charset or "utf-8", "replace")
            except LookupError:  # unknown encoding
                return page.decode("utf-8", "replace")

    parser = _Links()
    parser.feed(_run(system, ask(), _RANGE_SECONDS))
    parser.close()
    found: dict[str, None] = {}
    folder = urlsplit(url)
    for link in parser.found:
        try:
            target = urlsplit(urljoin(urljoin(url, parser.base), link))
            is_inside = _server(target) == _server(folder) and not target.query
        except ValueError:  # no address
            continue
        if is_inside and unquote(target.path).startswith(unquote(folder.path)):
            # The folder's user and password also apply to its files.
            found[target._replace(netloc=folder.netloc, fragment="").geturl()] = None
    return list(found)


class _Links(HTMLParser):
    """Targets of the links in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = (dict(attrs).get("href") or "").strip()
        if tag == "a" and target:
            self.found.append(target)
        elif tag == "base":
            self.base = self.base or target


def _server(address: SplitResult) -> tuple[str, str | None, int | None]:
    return address.scheme, address.hostname, address.port or _PORTS.get(address.scheme)


def _run(system: Any, request: Coroutine[Any, Any, T], seconds: float) -> T:
    """Run a coroutine on fsspec's event loop; cancel it when this thread is told to stop."""
    stop = current_stop()
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(request, seconds), system.loop)
    try:
        while not (stop and stop.is_set()):
            concurrent.futures.wait([future], _POLL if stop else None)
            if future.done():
                return future.result()
        raise InterruptedError("the result is no longer needed")
    finally:
        future.cancel()  # no effect once it is done
