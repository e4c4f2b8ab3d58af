"""A file server on loopback that fails in every way the downloader must survive."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from loopback import served
from patience import SECONDS, until


class Server:
    """Serves one file under every path; its next answers can be made to fail."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.etag: str | None = None
        self.modified: str | None = None
        self.paths: list[str] = []
        self.ranges: list[str | None] = []
        self.conditions: list[str | None] = []
        self.statuses: list[int] = []  # of the next answers; all is well once they are used up
        self.retry_after: str | None = None
        self.drop_after: list[int] = []  # one entry a connection: bytes sent before it is lost
        self.stall = False  # a lost connection stays open and silent
        self.honours_range = True
        self.honours_condition = True
        self.span: str | None = None  # another Content-Range than the true one
        self.length: str | None = None  # another Content-Length than the true one; "" is none
        self.chunked = False
        self.silent = threading.Event()  # set when such a connection has brought all that it will
        self.released = threading.Event()
        self.gate: threading.Event | None = None  # answers wait for it

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.paths.append(handler.path)
        asked = handler.headers["Range"]
        self.ranges.append(asked)
        condition = handler.headers["If-Range"]
        self.conditions.append(condition)
        if self.gate is not None:
            self.gate.wait(SECONDS)
        if self.statuses:
            handler.send_response(self.statuses.pop(0))
            if self.retry_after is not None:
                handler.send_header("Retry-After", self.retry_after)
            handler.end_headers()
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.honours_range else 0
        if condition and self.honours_condition and condition not in (self.etag, self.modified):
            start = 0
        if start and start >= len(self.content):
            handler.send_error(416)
            return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            end, size = len(self.content) - 1, len(self.content)
            handler.send_header("Content-Range", self.span or f"bytes {start}-{end}/{size}")
        for name, value in (("ETag", self.etag), ("Last-Modified", self.modified)):
            if value is not None:
                handler.send_header(name, value)
        if self.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        elif self.length != "":
            handler.send_header("Content-Length", self.length or str(len(body)))
        handler.end_headers()
        dropped = self.drop_after.pop(0) if self.drop_after else None
        sent = body[:dropped]
        if self.chunked and sent:
            sent = f"{len(sent):x}\r\n".encode() + sent + b"\r\n"
        handler.wfile.write(sent + (b"0\r\n\r\n" if self.chunked and dropped is None else b""))
        if dropped is not None and self.stall:
            handler.wfile.flush()
            until(lambda: not _on_the_way(handler.connection))
            self.silent.set()
            self.released.wait(SECONDS)


def _on_the_way(connection: socket.socket) -> int:
    """Bytes that the other end has not got yet."""
    (count,) = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
    return int(count)


@contextmanager
def serving(content: bytes) -> Iterator[tuple[Server, str]]:
    """A server of ``content`` and the address of its root, without a last slash."""
    server = Server(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with served(Handler) as url:
        try:
            yield server, url
        finally:
            server.released.set()
            if server.gate is not None:
                server.gate.set()


@contextmanager
def no_server() -> Iterator[str]:
    """The address of a port that nobody listens on, and that nobody else gets meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
