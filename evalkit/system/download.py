"""The one downloader: it resumes, retries and checks, and a file gets its name only when it is whole.

::

    done = download(["https://first.example/ref.npz", mirror], Path("ref.npz"), progress=bar)

``ref.npz.part`` holds what has arrived, ``ref.npz.part.json`` which version of which file that is the
beginning of: what a run was killed over, the next run goes on with, unless the file has changed meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from evalkit.errors import DownloadError, EvalkitError, OutputError
from evalkit.system.files import replace_atomically

try:
    import fcntl
except ImportError:  # Windows, where two processes must not fetch one file at the same time
    fcntl = None  # type: ignore[assignment]

__all__ = ["Download", "download", "file_sha256", "is_offline", "published_urls"]

PUBLISHED = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
BLOCK = 2**18
LONGEST_WAIT = 60.0
# Answers that may be another one in a moment; every other 4xx stays what it is.
PASSING = (408, 425, 429)


@dataclass(frozen=True, kw_only=True)
class Download:
    """A whole file.

    Attributes:
        path: Where it is.
        bytes: Its size.
        sha256: Its hex digest.
    """

    path: Path
    bytes: int
    sha256: str


def download(
    urls: Sequence[str],
    destination: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    max_bytes: int | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[Path], object] | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Download:
    """Download one file, resuming what an earlier connection or run has left.

    A file that is there already is kept, unless ``sha256`` says that it is another one. Of several processes
    that want one file, one downloads it and the others wait.

    Args:
        urls: Where the file is, tried in order.
        destination: Path of the file; its folders are made.
        sha256: Hex digest of the whole file, where known.
        size: Bytes of the whole file, where known.
        max_bytes: More than this is something else, and refused.
        timeout: Seconds without an answer or a byte after which a connection is given up.
        attempts: Connections to one URL, one after the other, that may bring nothing new. Between them the
            waits double: 1, 2, 4 seconds and so on, or as long as the server asks, up to a minute.
        progress: Called with (bytes so far, bytes in all, or 0 where the server does not say).
        check: Called with the path of the whole file before it gets its name; an EvalkitError refuses it.
        sleep: Waits that many seconds.

    Raises:
        DownloadError: No URL gave the file, and why; or ``EVALKIT_OFFLINE`` is set.
        OutputError: It cannot be written, or there is not enough disk space.
    """
    if (found := _already_there(destination, sha256)) is not None:
        return found
    if is_offline():
        raise DownloadError(
            f"{destination} is not there, and EVALKIT_OFFLINE forbids to download it. Get "
            f"{' or '.join(urls)} by other means and save it as {destination}, or unset EVALKIT_OFFLINE."
        )
    transfer = _Transfer(
        destination=destination,
        sha256=sha256,
        size=size,
        max_bytes=max_bytes,
        timeout=timeout,
        progress=progress,
        check=check,
    )
    failures: list[str] = []
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with transfer.held():
            if (found := _already_there(destination, sha256)) is not None:
                return found  # another process has brought it meanwhile
            for url in urls:
                try:
                    digest = _retrieve(transfer, url, attempts, sleep)
                except _Failure as failure:
                    failures.append(f"{url}: {failure}")
                    continue
                transfer.part.replace(destination)
                transfer.note.unlink(missing_ok=True)
                return Download(path=destination, bytes=destination.stat().st_size, sha256=digest)
    except OSError as error:
        raise OutputError(
            f"{destination.name} cannot be written to {destination.parent}: {error.strerror or error}. "
            "What has arrived is kept; run the same command again to go on."
        ) from error
    raise DownloadError(
        f"{destination.name} could not be downloaded. {'; '.join(failures)}. Try again later, what has "
        f"arrived is kept; or get the file by other means and save it as {destination}."
    )


def published_urls(path: str) -> tuple[str, ...]:
    """Where a file published with the ADM paper is, such as ``ref_batches/imagenet/64/...``.

    The environment variable ``EVALKIT_MIRROR`` names a copy of the published folder, which is tried first.
    """
    mirror = os.environ.get("EVALKIT_MIRROR", "").rstrip("/")
    return tuple(f"{base}/{path}" for base in (mirror, PUBLISHED) if base)


def is_offline() -> bool:
    """Whether ``EVALKIT_OFFLINE`` forbids to use the network."""
    return os.environ.get("EVALKIT_OFFLINE", "0") not in ("", "0")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _already_there(destination: Path, sha256: str | None) -> Download | None:
    if not destination.is_file():
        return None
    digest = file_sha256(destination)
    if sha256 not in (None, digest):
        return None
    return Download(path=destination, bytes=destination.stat().st_size, sha256=digest)


def _retrieve(transfer: _Transfer, url: str, attempts: int, sleep: Callable[[float], object]) -> str:
    """Connect to ``url`` until the file is whole; return its digest."""
    most, in_vain = transfer.have, 0
    while True:
        try:
            transfer.receive(url)
            return transfer.verified()
        except _Failure as failure:
            # Only bytes that were never reached before count, or starting over might never end.
            in_vain = 0 if transfer.have > most else in_vain + 1
            most = max(most, transfer.have)
            if failure.final or in_vain >= attempts:
                raise
            if in_vain:
                sleep(max(min(2.0 ** (in_vain - 1), LONGEST_WAIT), failure.wait))


class _Failure(Exception):
    """A connection did not bring the file; ``final`` where another one would not either."""

    def __init__(self, message: str, *, final: bool = False, wait: float = 0.0) -> None:
        super().__init__(message)
        self.final = final
        self.wait = wait


@dataclass(frozen=True)
class _Version:
    """What a server says of the file it sends; a partial file is the beginning of one version."""

    url: str
    size: int | None
    etag: str | None
    modified: str | None

    @property
    def condition(self) -> str | None:
        """For If-Range, which takes no weak tag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def differs_from(self, other: _Version) -> bool:
        """Whether the two cannot be the same bytes. What a server leaves out says nothing."""
        names = ("size", "etag", "modified") if self.url == other.url else ("size",)
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)


@dataclass(frozen=True)
class _Answer:
    """An open connection that brings the file, or the rest of it."""

    response: HTTPResponse
    start: int
    version: _Version

    @classmethod
    def read(cls, url: str, response: HTTPResponse) -> _Answer:
        """What the headers say; ``start`` is -1 for a part that does not say which."""
        start, size = 0, response.headers.get("Content-Length", "")
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
            start, size = (int(span[1]), span[3]) if span else (-1, "")
            if span and size == "*":  # all that follows was asked for, so the last byte is the file's
                size = str(int(span[2]) + 1)
        version = _Version(
            url=url,
            size=int(size) if size.isdecimal() else None,
            etag=response.headers.get("ETag"),
            modified=response.headers.get("Last-Modified"),
        )
        return cls(response, start, version)


@dataclass(kw_only=True)
class _Transfer:
    """The partial file, and what the whole must be; fields as for :func:`download`."""

    destination: Path
    sha256: str | None
    size: int | None
    max_bytes: int | None
    timeout: float
    progress: Callable[[int, int], None] | None
    check: Callable[[Path], object] | None
    doubtful: bool = False
    """Whether a wrong whole may be right at once: it is of pieces, or its size was never said."""

    @property
    def part(self) -> Path:
        """What has arrived."""
        return self.destination.with_name(f"{self.destination.name}.part")

    @property
    def note(self) -> Path:
        """The version that it is the beginning of."""
        return self.destination.with_name(f"{self.destination.name}.part.json")

    @property
    def have(self) -> int:
        """Bytes that have arrived."""
        return self.part.stat().st_size if self.part.exists() else 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from the partial file; leave no empty one behind."""
        with _lock(self.part):
            try:
                yield
            finally:
                if self.part.exists() and not self.have:
                    self.part.unlink()
                    self.note.unlink(missing_ok=True)

    def receive(self, url: str) -> None:
        """Append what one connection brings; raise _Failure unless that makes the file whole."""
        start, known = self.have, self._noted()
        if known is not None and start == known.size:
            self.doubtful = True
            return  # the run before ended between the last byte and the name
        if self.sha256 is None and (known is None or known.url != url):
            start = 0  # nothing would notice a file that is half of this and half of that
        answer = self._ask(url, start, known) or self._ask(url, 0, None)
        assert answer is not None  # who asks for the whole gets it, or a _Failure
        size = answer.version.size
        with answer.response:
            self._check_offer(answer)
            self.doubtful = bool(answer.start) or size is None
            if not answer.start:
                self._clear()
            if not answer.start or known is None or known.url != url:
                with replace_atomically(self.note) as partial:
                    partial.write_text(json.dumps(dataclasses.asdict(answer.version)))
            ended = self._append(answer)
        whole = self.have == size if size else ended and self.size in (None, self.have)
        if not whole:
            of = f" of {size:,}" if size else ""
            raise _Failure(f"the connection broke off after {self.have:,}{of} bytes")

    def verified(self) -> str:
        """The digest of the whole file; a wrong one is removed, as no more bytes could mend it."""
        digest = file_sha256(self.part)
        try:
            if self.sha256 not in (None, digest):
                raise DownloadError(f"it sent another file: sha256 {digest}, expected {self.sha256}")
            if self.check is not None:
                self.check(self.part)
        except EvalkitError as error:
            self._clear()
            raise _Failure(str(error).rstrip("."), final=not self.doubtful) from error
        return digest

    def _noted(self) -> _Version | None:
        try:
            return _Version(**json.loads(self.note.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _clear(self) -> None:
        with self.part.open("rb+") as file:  # and not unlink: others wait for this very file
            file.truncate(0)
        self.note.unlink(missing_ok=True)

    def _ask(self, url: str, start: int, known: _Version | None) -> _Answer | None:
        """Connect; None where the server has nothing that would go on from ``start``."""
        if not url.startswith(("http://", "https://")):
            raise _Failure("expected an address that begins with http:// or https://", final=True)
        headers = {"User-Agent": "evalkit"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if known is not None and known.url == url and known.condition:
                headers["If-Range"] = known.condition
        try:
            request = urllib.request.Request(url, headers=headers)
            response = urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and start:
                return None
            wait = error.headers.get("Retry-After", "")
            raise _Failure(
                f"the server answered {error.code} {error.reason}",
                final=error.code < 500 and error.code not in PASSING,
                wait=min(float(wait), LONGEST_WAIT) if wait.isdecimal() else 0.0,
            ) from error
        except (OSError, HTTPException, ValueError) as error:
            raise _Failure(f"no connection: {getattr(error, 'reason', error)}") from error
        answer = _Answer.read(url, response)
        if response.status == 200:
            return answer
        same = known is None or not answer.version.differs_from(known)
        if response.status == 206 and answer.start == start > 0 and same:
            return answer
        response.close()
        if start:
            return None
        raise _Failure(f"the server answered {response.status} {response.reason}, expected 200", final=True)

    def _check_offer(self, answer: _Answer) -> None:
        """Refuse what cannot be the file, or has no room, before its first byte is written."""
        size = answer.version.size
        if size is None:
            if self.sha256 is None and self.size is None and not answer.response.chunked:
                raise _Failure(
                    "the server does not say how large the file is, so its end would pass for the file's",
                    final=True,
                )
        elif self.size not in (None, size):
            raise _Failure(f"the server offers {size:,} bytes, expected {self.size:,}", final=True)
        elif not 0 < size <= (self.max_bytes or size):
            most = f"at most {self.max_bytes:,}" if self.max_bytes else "a file"
            raise _Failure(f"the server offers {size:,} bytes, expected {most}", final=True)
        need = (size or self.size or 0) - answer.start
        free = shutil.disk_usage(self.part.parent).free + self.have - answer.start
        if need > free:
            raise OutputError(
                f"{self.destination.name} needs {need / 1e9:.2f} GB and {self.part.parent} has "
                f"{free / 1e9:.2f} GB free. Free some space or choose another place, and run the same "
                "command again."
            )

    def _append(self, answer: _Answer) -> bool:
        """Write what comes; whether the server ended it, rather than the connection."""
        size = answer.version.size
        limit = size or self.size or self.max_bytes
        have = answer.start
        with self.part.open("ab") as file:
            while block := _block(answer.response):
                file.write(block)
                file.flush()  # nothing that came is lost with a process that is killed
                have += len(block)
                if limit and have > limit:
                    file.truncate(0)
                    raise _Failure(f"the server sends more than the {limit:,} bytes expected", final=True)
                if self.progress is not None:
                    self.progress(have, size or 0)
            file.flush()
            os.fsync(file.fileno())
        return block is not None


def _block(response: HTTPResponse) -> bytes | None:
    """The next bytes; none at the end, and None where the connection is lost."""
    try:
        # read() would wait for all of them, and lose them all with the connection.
        return response.read1(BLOCK)
    except (OSError, HTTPException):
        return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Make ``path`` and keep other processes, which do the same, waiting."""
    while fcntl is not None:
        with path.open("ab") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it before may have given the file that was opened its name, or removed it.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield
                return
    path.touch()
    yield
