"""A server on loopback that speaks as much of S3 as fsspec asks for, and fails where it is told to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from loopback import served

__all__ = ["Buckets", "buckets"]


class Buckets:
    """Objects by ``bucket/key``. A bucket is there once it has been named in ``names``."""

    def __init__(self) -> None:
        self.names = {"bucket"}
        self.objects: dict[str, bytes] = {}
        self.address = ""
        self.failing: dict[str, tuple[int, str]] = {}  # by method: status and code of all answers
        self.failures = 0  # answers of status 500 before those of PUT are as they should be
        self.asked: list[tuple[str, str, str | None]] = []  # method, path with its query, range
        self._lock = threading.Lock()

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        address = urlsplit(handler.path)
        path, query = unquote(address.path).strip("/"), parse_qs(address.query, keep_blank_values=True)
        method, asked = handler.command, handler.headers["Range"]
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        with self._lock:
            self.asked.append((method, handler.path, asked))
            if method in self.failing:
                return _error(*self.failing[method])
            bucket, _, key = path.partition("/")
            if bucket not in self.names:
                return _error(404, "NoSuchBucket")
            if method == "PUT" and self.failures:
                self.failures -= 1
                return _error(500, "InternalError")
            if method == "PUT" and key and not query:
                self.objects[path] = _content(handler, body)
                return 200, {"ETag": _tag(self.objects[path])}, b""
            if method == "GET" and "list-type" in query:
                return 200, {"Content-Type": "application/xml"}, self._listing(bucket, query).encode()
            if method == "HEAD" and not key:
                return 200, {}, b""
            if method in ("GET", "HEAD") and path in self.objects:
                return _object(self.objects[path], asked)
            return _error(404, "NoSuchKey") if method in ("GET", "HEAD") else _error(501, "NotImplemented")

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> str:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        entries, folders = [], set()
        for path in sorted(self.objects):
            key = path.removeprefix(f"{bucket}/")
            if key == path or not key.startswith(prefix):
                continue
            inside = key.removeprefix(prefix)
            if delimiter and delimiter in inside:
                folders.add(prefix + inside.partition(delimiter)[0] + delimiter)
            else:
                content = self.objects[path]
                entries.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size><ETag>{_tag(content)}</ETag>"
                    "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        entries += [
            f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(folders)
        ]
        count = f"<KeyCount>{len(entries)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult><Name>{bucket}</Name>{count}{''.join(entries)}</ListBucketResult>"


def _content(handler: BaseHTTPRequestHandler, body: bytes) -> bytes:
    """What was put, out of chunks with their checksum, as botocore sends them."""
    if "aws-chunked" not in handler.headers.get("Content-Encoding", ""):
        return body
    content = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size.partition(b";")[0], 16)
        if not count:
            break
        content, body = content + body[:count], body[count + 2 :]
    return content


def _object(content: bytes, asked: str | None) -> tuple[int, dict[str, str], bytes]:
    headers = {"ETag": _tag(content), "Last-Modified": formatdate(1.7e9, usegmt=True)}
    if not asked:
        return 200, headers, content
    first, _, last = asked.removeprefix("bytes=").partition("-")
    piece = content[int(first) : int(last) + 1 if last else None]
    headers["Content-Range"] = f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}"
    return 206, headers, piece


def _tag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    body = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>"
    return status, {"Content-Type": "application/xml"}, body.encode()


@contextmanager
def buckets() -> Iterator[Buckets]:
    """A server; ``address`` is its endpoint."""
    found = Buckets()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            status, headers, body = found.answer(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with served(Handler) as found.address:
        yield found
