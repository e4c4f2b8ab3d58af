"""A web server on loopback that sends files whole or by ranges, and fails where it is told to."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import quote, unquote, urlsplit

from loopback import served

__all__ = ["Shelf", "shelf"]


class Shelf:
    """Files by their path, ``/folder/a.png``; a path that ends in a slash is a page of links."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.address = ""
        self.has_tags = True
        self.has_sizes = True
        self.has_ranges = True
        self.has_head = True
        self.statuses: list[int] = []  # of the next answers to GET; all is well once they are used up
        self.always: int | None = None  # of all answers
        self.delay = 0.0
        self.modified: str | None = None  # Last-Modified of all files
        self.tag: str | None = None  # of all files, in place of hashes
        self.minds_conditions = True  # If-Match
        self.conditions: list[str | None] = []  # If-Unmodified-Since of all requests for files
        self.pages: dict[str, str] = {}  # in place of those of links; under "" for all
        # Changes the headers and the body of an answer 206.
        self.mangle: Callable[[dict[str, str], bytes], bytes] = lambda _, body: body
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.bytes_sent = 0
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def ranges(self) -> list[tuple[int, int]]:
        """The ranges that were asked for."""
        found = [re.fullmatch(r"bytes=(\d+)-(\d+)", asked) for *_, asked in self.asked if asked]
        return [(int(each[1]), int(each[2]) + 1) for each in found if each]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            time.sleep(self.delay)
            self._answer(handler)
        finally:
            with self._lock:
                self._now -= 1

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers["Range"]
        self.asked.append((handler.command, handler.path, asked))
        path = unquote(urlsplit(handler.path).path)
        if self.always or (handler.command == "GET" and self.statuses):
            self._send(handler, self.always or self.statuses.pop(0), {}, b"")
            return
        if handler.command == "HEAD" and not self.has_head:
            self._send(handler, 403, {}, b"")
            return
        if path.endswith("/"):
            self._send(handler, 200, {"Content-Type": "text/html"}, self._page(path))
            return
        if (content := self.files.get(path)) is None:
            self._send(handler, 404, {}, b"")
            return
        tag = self.tag or f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        self.conditions.append(handler.headers["If-Unmodified-Since"])
        headers = {"ETag": tag} if self.has_tags else {}
        if self.modified:
            headers["Last-Modified"] = self.modified
        if self.minds_conditions and self.has_tags and handler.headers.get("If-Match", tag) != tag:
            self._send(handler, 412, {}, b"")
        elif asked and self.has_ranges:
            start, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            piece = content[start : last + 1]
            headers["Content-Range"] = f"bytes {start}-{start + len(piece) - 1}/{len(content)}"
            piece = self.mangle(headers, piece)
            self._send(handler, 206, headers, piece)
        else:
            self._send(handler, 200, headers, content)

    def _page(self, folder: str) -> bytes:
        if (page := self.pages.get(folder, self.pages.get(""))) is not None:
            return page.encode()
        inside = {path.removeprefix(folder) for path in self.files if path.startswith(folder)}
        names = sorted({re.sub(r"/.*", "/", path) for path in inside})
        links = [f'<a href="{quote(name)}">{name}</a>' for name in ["?C=N;O=D", "../", *names]]
        return "\n".join(links).replace("%3F", "?").encode()

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if self.has_sizes:
            handler.send_header("Content-Length", str(len(body)))
        else:
            handler.send_header("Connection", "close")
        handler.end_headers()
        if handler.command != "HEAD":
            try:
                handler.wfile.write(body)
                self.bytes_sent += len(body)
            except OSError:
                pass  # the client has read enough


@contextmanager
def shelf() -> Iterator[Shelf]:
    """A server; ``address`` is that of its root, without a last slash."""
    found = Shelf()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            found.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with served(Handler) as found.address:
        yield found
