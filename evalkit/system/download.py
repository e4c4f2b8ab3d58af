"""Download a file, with resume, retries and verification. It gets its final name only when it is complete.

::

    done = download(["https://first.example/ref.npz", mirror], Path("ref.npz"), progress=bar)

``ref.npz.part`` has the bytes received so far, and ``ref.npz.part.json`` the URL and version of the file that
they belong to. The next run resumes an interrupted download, unless the file has changed on the server.
``ref.npz.part.lock`` makes other processes wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evalkit.errors import DownloadError, EvalkitError, OutputError
from evalkit.system.connection import LONGEST_WAIT, Answer, Failure, Version, ask, next_block
from evalkit.system.files import replace_atomically
from evalkit.system.locks import exclusive_lock
from evalkit.system.progress import Progress
from evalkit.system.space import check_free_space
from evalkit.system.urls import is_offline

__all__ = ["Download", "download", "file_sha256", "published_urls"]

PUBLISHED = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"


@dataclass(frozen=True, kw_only=True)
class Download:
    """A complete file.

    Attributes:
        path: Path of the file.
        bytes: Size of the file.
        sha256: Hex digest of the file.
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
    progress: Progress | None = None,
    check: Callable[[Path], object] | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Download:
    """Download one file, resuming an earlier connection or run.

    An existing file is kept, unless ``sha256`` shows that it is a different one. If several processes need
    the same file, one downloads it and the others wait.

    Args:
        urls: URLs of the file, tried in order.
        destination: Path of the file; missing folders are created.
        sha256: Hex digest of the whole file, if known.
        size: Bytes of the whole file, if known.
        max_bytes: Refuse a larger file.
        timeout: Seconds without a response or a byte after which a connection is closed.
        attempts: Number of consecutive connections to one URL that may deliver nothing new. The delay between
            them doubles: 1, 2, 4 seconds and so on, or as long as the server asks for, up to a minute.
        progress: Called with (name of the file, bytes so far, total bytes).
        check: Called with the path of the complete file before it is renamed; an EvalkitError rejects it.
        sleep: Called with the number of seconds to wait.

    Raises:
        DownloadError: All URLs failed; the message says why. Or ``EVALKIT_OFFLINE`` is set.
        OutputError: The file cannot be written, or there is not enough disk space.
    """
    if (found := _already_there(destination, sha256)) is not None:
        return found
    if is_offline():
        raise DownloadError(
            f"{destination} does not exist, and EVALKIT_OFFLINE forbids downloading it. Get "
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
                return found  # another process downloaded it in the meantime
            for url in urls:
                try:
                    digest = _retrieve(transfer, url, attempts, sleep)
                except Failure as failure:
                    failures.append(f"{url}: {failure}")
                    continue
                transfer.part.replace(destination)
                transfer.note.unlink(missing_ok=True)
                return Download(path=destination, bytes=destination.stat().st_size, sha256=digest)
    except OSError as error:
        raise OutputError(
            f"{destination.name} cannot be written to {destination.parent}: {error.strerror or error}. "
            "The part received so far is kept; run the same command again to continue."
        ) from error
    raise DownloadError(
        f"{destination.name} could not be downloaded. {'; '.join(failures)}. Try again later: the part "
        f"received so far is kept. Or get the file by other means and save it as {destination}."
    )


def published_urls(path: str) -> tuple[str, ...]:
    """URLs of a file published with the ADM paper, such as ``ref_batches/imagenet/64/...``.

    If the environment variable ``EVALKIT_MIRROR`` names a copy of the published folder, it comes first.
    """
    mirror = os.environ.get("EVALKIT_MIRROR", "").rstrip("/")
    return tuple(f"{base}/{path}" for base in (mirror, PUBLISHED) if base)


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
    """Connect to ``url`` until the file is complete; return its digest."""
    most, in_vain = transfer.have, 0
    while True:
        try:
            transfer.receive(url)
            return transfer.verified()
        except Failure as failure:
            # Only bytes beyond the farthest position so far count as new; otherwise restarts might never end.
            in_vain = 0 if transfer.have > most else in_vain + 1
            most = max(most, transfer.have)
            if failure.final or in_vain >= attempts:
                raise
            if in_vain:
                sleep(max(min(2.0 ** (in_vain - 1), LONGEST_WAIT), failure.wait))


@dataclass(kw_only=True)
class _Transfer:
    """The partial file, and metadata of the complete one; fields as for :func:`download`."""

    destination: Path
    sha256: str | None
    size: int | None
    max_bytes: int | None
    timeout: float
    progress: Progress | None
    check: Callable[[Path], object] | None
    doubtful: bool = False
    """Whether a complete file that is wrong is worth another try: it is made of several pieces, or the server
    never gave its size."""

    @property
    def part(self) -> Path:
        """File with the bytes received so far."""
        return self.destination.with_name(f"{self.destination.name}.part")

    @property
    def note(self) -> Path:
        """File with the version that these bytes belong to."""
        return self.destination.with_name(f"{self.destination.name}.part.json")

    @property
    def have(self) -> int:
        """Number of bytes received so far."""
        return self.part.stat().st_size if self.part.exists() else 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the partial file against other processes, and remove it at the end if it is empty."""
        lock = self.destination.with_name(f"{self.destination.name}.part.lock")
        with exclusive_lock(lock, f"downloading {self.destination}", wait=True):
            try:
                yield
            finally:
                if not self.have:
                    self._clear()
                # Safe while the lock is held: see exclusive_lock. Windows refuses; there filelock does it.
                with contextlib.suppress(OSError):
                    lock.unlink()

    def receive(self, url: str) -> None:
        """Append the bytes of one connection; raise Failure unless they complete the file."""
        start, known = self.have, self._noted()
        if known is not None and start == known.size:
            self.doubtful = True
            return  # an earlier run ended between the last byte and the rename
        if self.sha256 is None and (known is None or known.url != url):
            start = 0  # otherwise, halves of two different files could be joined unnoticed
        answer = ask(url, start, known, self.timeout) or ask(url, 0, None, self.timeout)
        assert answer is not None  # a request for the whole file either has an answer or raises Failure
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
            raise Failure(f"the connection broke off after {self.have:,}{of} bytes")

    def verified(self) -> str:
        """The digest of the complete file. A wrong file is removed, as more bytes could not repair it."""
        digest = file_sha256(self.part)
        try:
            if self.sha256 not in (None, digest):
                raise DownloadError(f"it sent another file: sha256 {digest}, expected {self.sha256}")
            if self.check is not None:
                self.check(self.part)
        except EvalkitError as error:
            self._clear()
            raise Failure(str(error).rstrip("."), final=not self.doubtful) from error
        return digest

    def _noted(self) -> Version | None:
        try:
            return Version(**json.loads(self.note.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _clear(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _check_offer(self, answer: Answer) -> None:
        """Refuse a wrong file, or one that does not fit on the disk, before the first byte is written."""
        size = answer.version.size
        if size is None:
            if self.sha256 is None and self.size is None and not answer.response.chunked:
                raise Failure(
                    "the server does not say how large the file is, so a lost connection would go unnoticed",
                    final=True,
                )
        elif self.size not in (None, size):
            raise Failure(f"the server offers {size:,} bytes, expected {self.size:,}", final=True)
        elif not 0 < size <= (self.max_bytes or size):
            most = f"at most {self.max_bytes:,}" if self.max_bytes else "a file"
            raise Failure(f"the server offers {size:,} bytes, expected {most}", final=True)
        check_free_space(
            self.part.parent,
            (size or self.size or 0) - answer.start,
            self.destination.name,
            "Free some space or choose another place, and run the same command again.",
            reusable=self.have - answer.start,
        )

    def _append(self, answer: Answer) -> bool:
        """Write the received bytes; True if the server ended the response, False if the connection broke."""
        size = answer.version.size
        limit = size or self.size or self.max_bytes
        have = answer.start
        with self.part.open("ab") as file:
            while block := next_block(answer.response):
                file.write(block)
                file.flush()  # so that a killed process loses nothing it has received
                have += len(block)
                if limit and have > limit:
                    file.truncate(0)
                    raise Failure(f"the server sends more than the {limit:,} bytes expected", final=True)
                if self.progress is not None:
                    self.progress(self.destination.name, have, size or 0)
            file.flush()
            os.fsync(file.fileno())
        return block is not None
