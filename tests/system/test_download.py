"""The downloader against a server that drops, stalls, lies, and changes its file; and killed midway."""

from __future__ import annotations

import fcntl
import hashlib
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from file_server import Server, no_server, serving
from patience import SECONDS, until

from evalkit.errors import DownloadError, InputError, OutputError
from evalkit.system.download import download, published_urls
from evalkit.system.urls import is_offline

CONTENT = random.Random(0).randbytes(100_000)
OTHER = random.Random(1).randbytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVALKIT_OFFLINE")
    monkeypatch.delenv("EVALKIT_MIRROR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.npz"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the downloader waited for, without waiting."""
    waits: list[float] = []
    defaults = download.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "sleep", waits.append)
    return waits


def left_behind(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir() if path != file)


def time_out_in_silence(server: Server, timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections with that ``timeout`` time out as soon as, and only when, the server has fallen silent."""
    readinto = socket.SocketIO.readinto

    def patched(self: socket.SocketIO, buffer: Any) -> int | None:
        connection: socket.socket = self._sock  # type: ignore[attr-defined]
        if connection.gettimeout() == timeout:
            while not select.select([connection], [], [], 0.01)[0]:
                if server.silent.is_set() and not select.select([connection], [], [], 0)[0]:
                    server.silent.clear()
                    raise TimeoutError("timed out")
        return readinto(self, buffer)

    monkeypatch.setattr(socket.SocketIO, "readinto", patched)


# What arrives --------------------------------------------------------------------------------------


def test_a_file_arrives_whole(tmp_path: Path, waits: list[float]) -> None:
    file, steps = tmp_path / "new" / "folder" / "file.npz", []
    with serving(CONTENT) as (server, url):
        done = download([url], file, progress=lambda *step: steps.append(step))
    assert (done.path, done.bytes, done.sha256) == (file, len(CONTENT), SHA256)
    assert file.read_bytes() == CONTENT
    assert steps == sorted(steps)
    assert steps[-1] == ("file.npz", len(CONTENT), len(CONTENT))
    assert left_behind(file) == []
    assert (server.ranges, waits) == ([None], [])


def test_what_is_there_stays_unless_it_is_another_file(file: Path) -> None:
    file.write_bytes(OTHER)
    with serving(CONTENT) as (server, url):
        assert download([url], file).sha256 == hashlib.sha256(OTHER).hexdigest()
        assert server.ranges == []
        assert download([url], file, sha256=SHA256).sha256 == SHA256
        assert download([url], file, sha256=SHA256).sha256 == SHA256
        assert server.ranges == [None]
    assert file.read_bytes() == CONTENT


def test_the_next_address_is_tried(file: Path) -> None:
    with serving(CONTENT) as (missing, first), serving(CONTENT) as (_, second):
        missing.statuses = [404]
        download([first, second], file)
    assert file.read_bytes() == CONTENT


def test_published_files_come_from_the_mirror_first(monkeypatch: pytest.MonkeyPatch) -> None:
    (official,) = published_urls("ref_batches/lsun/cat/x.npz")
    assert official.startswith("https://")
    assert official.endswith("/jul-2021/ref_batches/lsun/cat/x.npz")
    monkeypatch.setenv("EVALKIT_MIRROR", "http://mirror.example/copy/")
    assert published_urls("a/x.npz")[0] == "http://mirror.example/copy/a/x.npz"
    assert len(published_urls("a/x.npz")) == 2


# Connections that are lost -------------------------------------------------------------------------


def test_dropped_connections_are_resumed_at_once(file: Path, waits: list[float]) -> None:
    with serving(CONTENT) as (server, url):
        server.drop_after = [1000, 500]
        download([url], file)
    assert server.ranges == [None, "bytes=1000-", "bytes=1500-"]
    assert waits == []
    assert file.read_bytes() == CONTENT
    assert left_behind(file) == []


def test_an_earlier_run_is_resumed(file: Path) -> None:
    with serving(CONTENT) as (server, url):
        server.drop_after = [700, 0]
        with pytest.raises(DownloadError, match=r"broke off after 700 of 100,000 bytes.*Try again later"):
            download([url], file, attempts=1)
        assert not file.exists()
        download([url], file)
    assert server.ranges == [None, "bytes=700-", "bytes=700-"]
    assert file.read_bytes() == CONTENT


def test_a_server_that_ignores_ranges_starts_over(file: Path) -> None:
    with serving(CONTENT) as (server, url):
        server.honours_range = False
        server.drop_after = [1000]
        download([url], file)
    assert server.ranges == [None, "bytes=1000-"]
    assert file.read_bytes() == CONTENT


def test_starting_over_again_and_again_ends(file: Path, waits: list[float]) -> None:
    with serving(CONTENT) as (server, url):
        server.honours_range = False
        server.drop_after = [1000] * 9
        with pytest.raises(DownloadError, match="broke off after 1,000 of 100,000 bytes"):
            download([url], file)
    assert len(server.ranges) == 6  # the first brought something, five did not
    assert waits == [1, 2, 4, 8]


def test_a_stalled_server_is_given_up_and_resumed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CONTENT) as (server, url):
        time_out_in_silence(server, SECONDS, monkeypatch)
        server.stall, server.drop_after = True, [600, 0]
        with pytest.raises(DownloadError, match="broke off after 600 of"):
            download([url], file, timeout=SECONDS, attempts=1)
        assert file.with_name("file.npz.part").read_bytes() == CONTENT[:600]
        server.drop_after = [50]
        download([url], file, timeout=SECONDS)
    assert server.ranges[-2:] == ["bytes=600-", "bytes=650-"]
    assert file.read_bytes() == CONTENT


def test_a_whole_part_without_its_note_is_not_trusted(file: Path) -> None:
    file.with_name("file.npz.part").write_bytes(CONTENT)
    with serving(CONTENT) as (server, url):
        download([url], file, sha256=SHA256)
    assert server.ranges == ["bytes=100000-", None]
    assert file.read_bytes() == CONTENT


def test_a_part_without_its_note_counts_only_where_a_digest_tells(file: Path) -> None:
    for sha256, asked in ((None, None), (SHA256, "bytes=10-")):
        file.unlink(missing_ok=True)
        file.with_name("file.npz.part").write_bytes(CONTENT[:10])
        file.with_name("file.npz.part.json").write_text("{damaged")
        with serving(CONTENT) as (server, url):
            download([url], file, sha256=sha256)
        assert server.ranges == [asked]
        assert file.read_bytes() == CONTENT


def test_a_run_that_ended_before_the_name_was_given(file: Path) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with serving(CONTENT) as (server, url):
        with pytest.raises(KeyboardInterrupt):
            download([url], file, check=interrupted)
        assert not file.exists()
        download([url], file)
        assert server.ranges == [None]
    assert file.read_bytes() == CONTENT
    assert left_behind(file) == []


def test_part_of_another_address(file: Path) -> None:
    for sha256, asked in ((None, None), (SHA256, "bytes=900-")):
        file.unlink(missing_ok=True)
        with serving(CONTENT) as (first, url), serving(CONTENT) as (second, mirror):
            first.drop_after = [900, 0]
            first.etag = '"first"'
            download([url, mirror], file, sha256=sha256, attempts=1)
            assert (second.ranges, second.conditions) == ([asked], [None])
        assert file.read_bytes() == CONTENT


# Answers that are not the file -----------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_is_not_there_is_not_asked_for_again(file: Path, waits: list[float], status: int) -> None:
    with serving(CONTENT) as (server, url):
        server.statuses = [status] * 9
        with pytest.raises(DownloadError, match=rf"{url}: the server answered {status}.*save it as {file}"):
            download([url], file)
    assert (len(server.ranges), waits) == (1, [])
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_server_that_recovers(file: Path, waits: list[float], status: int) -> None:
    with serving(CONTENT) as (server, url):
        server.statuses = [status] * 3
        download([url], file)
    assert waits == [1, 2, 4]
    assert file.read_bytes() == CONTENT


def test_a_server_that_does_not_recover(file: Path, waits: list[float]) -> None:
    with serving(CONTENT) as (server, url):
        server.statuses = [500] * 9
        with pytest.raises(DownloadError, match="the server answered 500"):
            download([url], file)
    assert len(server.ranges) == 5
    assert waits == [1, 2, 4, 8]
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize(("asked", "first"), [("7", 7), ("100000", 60), ("0", 1), ("Wed, 21 Oct 2026", 1)])
def test_a_server_may_ask_for_a_longer_wait(file: Path, waits: list[float], asked: str, first: float) -> None:
    with serving(CONTENT) as (server, url):
        server.statuses, server.retry_after = [429], asked
        download([url], file)
    assert waits == [first]


def test_a_part_that_was_not_asked_for(file: Path) -> None:
    with serving(CONTENT) as (server, url):
        server.statuses = [206]
        with pytest.raises(DownloadError, match="the server answered 206"):
            download([url], file)


@pytest.mark.parametrize("span", ["bytes 0-99/100000", "bytes 1001-99999/100000", "bytes", "items 1000-1/2"])
def test_the_wrong_part_starts_over(file: Path, span: str) -> None:
    with serving(CONTENT) as (server, url):
        server.drop_after, server.span = [1000], span
        download([url], file)
    assert server.ranges == [None, "bytes=1000-", None]
    assert file.read_bytes() == CONTENT


def test_a_part_that_does_not_say_the_size_of_the_whole(file: Path) -> None:
    with serving(CONTENT) as (server, url):
        server.drop_after, server.span = [1000], "bytes 1000-99999/*"
        download([url], file)
    assert server.ranges == [None, "bytes=1000-"]
    assert file.read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "x.npz", "http://[bad/"])
def test_addresses_that_are_none(file: Path, url: str, waits: list[float]) -> None:
    with pytest.raises(DownloadError, match=r"begins with http|no connection"):
        download([url], file)
    assert list(file.parent.iterdir()) == []


def test_no_server(file: Path, waits: list[float]) -> None:
    with no_server() as url, pytest.raises(DownloadError, match=r"no connection: .*refused"):
        download([url], file)
    assert waits == [1, 2, 4, 8]


# Sizes that are lies ---------------------------------------------------------------------------------


def test_less_comes_than_announced(file: Path, waits: list[float]) -> None:
    with serving(CONTENT[:5000]) as (server, url):
        server.length = "9000"
        with pytest.raises(DownloadError, match="broke off after 5,000 of 9,000 bytes"):
            download([url], file)
    assert not file.exists()
    assert len(waits) == 4


def refuse(path: Path) -> None:
    if path.read_bytes() != CONTENT:
        raise InputError(f"{path} is cut off.")


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"sha256": SHA256}, "it sent another file: sha256 .*, expected"),
        ({"size": len(CONTENT)}, "offers 5,000 bytes, expected 100,000"),
        ({"check": refuse}, "is cut off"),
    ],
)
def test_more_comes_than_announced(file: Path, known: dict[str, Any], message: str) -> None:
    with serving(CONTENT) as (server, url):
        server.length = "5000"
        with pytest.raises(DownloadError, match=message):
            download([url], file, **known)
    assert len(server.ranges) == 1
    assert list(file.parent.iterdir()) == []


def test_an_offer_of_another_size_is_refused_and_the_part_kept(file: Path) -> None:
    with serving(CONTENT) as (server, url):
        server.drop_after = [700, 0]
        with pytest.raises(DownloadError, match="broke off"):
            download([url], file, attempts=1)
        for known, expected in (({"size": 10}, "expected 10"), ({"max_bytes": 99_999}, "at most 99,999")):
            with pytest.raises(DownloadError, match=f"offers 100,000 bytes, .*{expected}"):
                download([url], file, **known)
        assert file.with_name("file.npz.part").read_bytes() == CONTENT[:700]
    with serving(b"") as (_, url), pytest.raises(DownloadError, match="offers 0 bytes"):
        download([url], file)


@pytest.mark.parametrize("known", [{}, {"size": len(CONTENT)}, {"sha256": SHA256}])
@pytest.mark.parametrize("chunked", [True, False])
def test_no_size_announced(file: Path, chunked: bool, known: dict[str, Any]) -> None:
    with serving(CONTENT) as (server, url):
        server.chunked, server.length, server.drop_after = chunked, "", [1000]
        if not known and not chunked:
            with pytest.raises(DownloadError, match="does not say how large the file is"):
                download([url], file)
            return
        download([url], file, **known, sleep=lambda seconds: None)
    assert file.read_bytes() == CONTENT


def test_endless_content_is_cut(file: Path) -> None:
    with serving(CONTENT) as (server, url):
        server.chunked = True
        for known in ({"size": 5000}, {"max_bytes": 5000}):
            with pytest.raises(DownloadError, match="sends more than the 5,000 bytes expected"):
                download([url], file, **known)
    assert list(file.parent.iterdir()) == []


# A file that changes midway --------------------------------------------------------------------------


class Case(NamedTuple):
    etag: str | None = None
    modified: bool = False
    honours_condition: bool = True
    longer: int = 0
    known: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default


@pytest.mark.parametrize(
    "case",
    [
        Case(etag='"%s"'),
        Case(modified=True),
        Case(etag='W/"%s"', modified=True),
        Case(etag='"%s"', honours_condition=False),
        Case(etag='W/"%s"'),
        Case(modified=True, honours_condition=False),
        Case(longer=1),
        Case(known={"sha256": hashlib.sha256(OTHER).hexdigest()}),
        Case(known={"check": lambda path: refuse_half(path)}),
    ],
)
def test_a_file_that_changes_midway_is_never_half_and_half(
    file: Path, waits: list[float], case: Case
) -> None:
    new = OTHER + bytes(case.longer)
    with serving(CONTENT) as (server, url):
        server.honours_condition = case.honours_condition
        server.etag = case.etag and case.etag % "one"
        server.modified = "Tue, 01 Jun 2021 00:00:00 GMT" if case.modified else None
        server.drop_after = [60_000, 0]
        with pytest.raises(DownloadError, match="broke off"):
            download([url], file, attempts=1)
        server.content = new
        server.etag = case.etag and case.etag % "two"
        server.modified = "Wed, 02 Jun 2021 00:00:00 GMT" if case.modified else None
        download([url], file, **case.known)
    # A server that compares sends the new file at once, unless it has but a weak tag to compare.
    compares = case.honours_condition and (case.modified or case.etag == '"%s"')
    assert len(server.ranges) == (3 if compares else 4)
    assert file.read_bytes() == new
    assert left_behind(file) == []


def refuse_half(path: Path) -> None:
    if path.read_bytes() not in (CONTENT, OTHER):
        raise InputError("half and half")


def test_a_wrong_file_leaves_nothing_and_the_next_address_is_tried(file: Path) -> None:
    with serving(OTHER) as (server, url), serving(CONTENT) as (_, mirror):
        with pytest.raises(DownloadError, match=f"{url}: it sent another file: sha256 "):
            download([url], file, sha256=SHA256)
        assert list(file.parent.iterdir()) == []
        assert len(server.ranges) == 1
        download([url, mirror], file, sha256=SHA256)
    assert file.read_bytes() == CONTENT


# The disk --------------------------------------------------------------------------------------------


def test_room_is_checked_before_the_first_byte(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(file.parent)
    with serving(CONTENT) as (server, url):
        server.drop_after = [40_000, 0]
        with pytest.raises(DownloadError):
            download([url], file, attempts=1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=59_999))
        with pytest.raises(OutputError, match=r"file\.npz needs 0\.00 GB, and .* has 0\.00 GB free"):
            download([url], file)
        assert file.with_name("file.npz.part").stat().st_size == 40_000
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60_000))
        download([url], file)
    assert file.read_bytes() == CONTENT


def test_a_file_that_cannot_grow_keeps_what_has_arrived(file: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(CONTENT) as (server, url):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(OutputError, match=r"cannot be written to .*File too large"):
                download([url], file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        download([url], file)
    assert server.ranges == [None, "bytes=50000-"]
    assert file.read_bytes() == CONTENT


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serving(CONTENT) as (_, url), pytest.raises(OutputError, match="cannot be written to"):
        download([url], tmp_path / "file" / "x.npz")


# Offline, killed, and two at once --------------------------------------------------------------------


def test_offline(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_offline()
    monkeypatch.setenv("EVALKIT_OFFLINE", "0")
    assert not is_offline()
    monkeypatch.setenv("EVALKIT_OFFLINE", "1")
    with serving(CONTENT) as (server, url):
        with pytest.raises(DownloadError, match=f"Get {url} or other by other means and save it as {file}"):
            download([url, "other"], file)
        file.write_bytes(CONTENT)
        assert download([url], file, sha256=SHA256).path == file
        assert server.ranges == []


@pytest.fixture
def had_to_wait(monkeypatch: pytest.MonkeyPatch) -> dict[int, bool]:
    """For every thread that asked for the lock: whether another one held it at first."""
    had_to_wait: dict[int, bool] = {}
    flock = fcntl.flock

    def noting(file: Any, how: int) -> None:
        try:
            flock(file, how)
        except BlockingIOError:
            had_to_wait.setdefault(threading.get_ident(), True)
            raise
        if how != fcntl.LOCK_UN:
            had_to_wait.setdefault(threading.get_ident(), False)

    monkeypatch.setattr(fcntl, "flock", noting)
    return had_to_wait


def test_killed_midway_and_run_again(file: Path) -> None:
    code = "import sys; from pathlib import Path; from evalkit.system.download import download\n"
    code += f"download([sys.argv[1]], Path(sys.argv[2]), timeout={SECONDS})"
    part = file.with_name("file.npz.part")
    with serving(CONTENT) as (server, url):
        server.etag = '"one"'
        for have in (30_000, 80_000):
            server.stall, server.drop_after = True, [have - (part.stat().st_size if part.exists() else 0)]
            with subprocess.Popen([sys.executable, "-c", code, url, str(file)], text=True) as child:
                until(lambda have=have: part.exists() and part.stat().st_size == have, child)  # type: ignore[misc]
                child.send_signal(signal.SIGKILL)
                assert child.wait() == -signal.SIGKILL
            assert not file.exists()
        subprocess.run([sys.executable, "-c", code, url, file], check=True)
    assert server.ranges == [None, "bytes=30000-", "bytes=80000-"]
    assert file.read_bytes() == CONTENT
    assert left_behind(file) == []


def test_two_at_once_download_once(file: Path, had_to_wait: dict[int, bool]) -> None:
    with serving(CONTENT) as (server, url):
        server.gate = threading.Event()
        digests: list[str] = []
        threads = [
            threading.Thread(target=lambda: digests.append(download([url], file).sha256)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(server.ranges) > 0 and len(had_to_wait) >= 3)
        assert sorted(had_to_wait.values()) == [False, True, True]
        server.gate.set()
        for thread in threads:
            thread.join()
    assert server.ranges == [None]
    assert digests == [SHA256] * 3
    assert file.read_bytes() == CONTENT
    assert left_behind(file) == []


@pytest.mark.parametrize(("status", "asked"), [(None, "bytes=1000-"), (404, None)])
def test_the_second_goes_on_where_the_first_failed(
    file: Path, status: int | None, asked: str | None, had_to_wait: dict[int, bool]
) -> None:
    with serving(CONTENT) as (server, url):
        server.gate = threading.Event()
        server.drop_after = [1000, 0] if status is None else []
        server.statuses = [] if status is None else [status]
        failed: list[DownloadError] = []

        def one() -> None:
            try:
                download([url], file, attempts=1)
            except DownloadError as error:
                failed.append(error)

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: len(server.ranges) > 0 and len(had_to_wait) >= 2)
        assert sorted(had_to_wait.values()) == [False, True]
        server.gate.set()
        for thread in threads:
            thread.join()
    assert len(failed) == 1
    assert server.ranges[-1] == asked
    assert file.read_bytes() == CONTENT
    assert left_behind(file) == []
