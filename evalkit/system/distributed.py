"""One job, shared by the processes of torchrun through files. One long file, as it will be replaced whole.

::

    <root>/<job>/team             a slot of bytes for each process: what it is at, and how it ended
    <root>/<job>/<id>/<work>/     results on their way from one process to the others

No process waits for a message. A process claims work by locking a byte of a file, so work goes to whichever
is free. The kernel releases the lock when the process ends, however it ends, also across the hosts of a
shared file system. Each process holds such a lock on its slot, which shows the others that it is alive; one
that died, failed or made no progress for :data:`STALL_SECONDS` ends the job with its rank and the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import numpy as np

from evalkit.errors import EvalkitError, InputError, OutputError, WorkerError
from evalkit.system import processes
from evalkit.system.files import replace_atomically
from evalkit.system.locks import HAS_CLAIMS, claim, release, try_claim
from evalkit.system.progress import Progress
from evalkit.system.team_engine import Arrays

__all__ = ["STALL_SECONDS", "Team"]


STALL_SECONDS = 1800.0
"""How long a process may make no progress while others wait; ``EVALKIT_STALL_SECONDS`` changes it."""

SLOT = 1024
BEAT_SECONDS = 1.0
WAITING = "waiting"
WATCH_SECONDS = 5.0
POLL_SECONDS = (0.02, 1.0)
JOIN_SECONDS = 30.0
MEET_SECONDS = 5.0
BEGIN_SECONDS = 300.0
OLD_SECONDS = 7 * 86400.0
TERMINATED = 128 + signal.SIGTERM
_ELSEWHERE = "Set EVALKIT_CACHE to a folder on another, or mount it with locks."
# Offsets in a slot of the bytes that stand for: a process has this rank; what the slot says is of this job.
_OWNED, _WRITTEN = 0, 1


class Team:
    """The processes of one job, as one of them sees the others; made by :meth:`join`.

    Attributes:
        rank: Of this process. Rank 0 speaks for all.
        size: How many there are.
    """

    def __init__(self, root: Path, slots: IO[bytes], rank: int, size: int, stall: float):
        self.rank = rank
        self.size = size
        self._root = root
        self._slots = slots
        # How long a process may be in one of these states without a change while this one waits.
        self._patience = {"absent": min(stall, BEGIN_SECONDS), "running": stall}
        self._job = ""
        self._status = "running"
        self._beats = 0
        self._beaten = self._watched = -float("inf")
        # What each slot was last seen to say, and since when.
        self._seen: dict[int, tuple[bytes, float]] = {}

    @classmethod
    @contextmanager
    def join(cls, root: Path) -> Iterator[Self]:
        """Take part in the job that torchrun started.

        The block ends when every process has come to its end; it ends with an error where one did not.

        Args:
            root: A folder that all processes see.

        Raises:
            InputError: The environment is not torchrun's.
            OutputError: The folder cannot be written or has no locks.
            WorkerError: Another process died, failed, or stopped making progress.
        """
        if not HAS_CLAIMS:
            raise InputError("Several processes need file locks that this system does not have: use one.")
        rank, size = processes.rank(), processes.world_size()
        # The same for all processes of a job, and different for jobs that run at the same time.
        key = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
        folder = root / hashlib.sha256(json.dumps([*key, size]).encode()).hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            slots = os.fdopen(os.open(folder / "team", os.O_RDWR | os.O_CREAT, 0o666), "rb+", buffering=0)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        with slots, _terminated_as_exception():
            team = cls(folder, slots, rank, size, _stall_seconds())
            team._acquire(_OWNED)
            try:
                team._begin()
                yield team
                team._end()
            except BaseException as error:
                team._fail(error)

    def map(self, name: str, count: int, work: Callable[[int], Arrays]) -> Iterator[Arrays]:
        """``work(0)`` to ``work(count - 1)``, each done by one process of the team; waits until all are done.

        Args:
            name: The same in every process, and different for different work.
            count: How many.
            work: Returns named arrays, of any type but objects.

        Returns:
            Reads the results in order, one at a time.
        """
        self._wait(self._knows_job, "rank 0 to begin")
        folder = self._root / self._job / name
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{index:06d}.npz" for index in range(count)]

        def missing() -> list[int]:
            there = set(folder.iterdir())
            return [index for index, path in enumerate(paths) if path not in there]

        for index in self.claims(folder / "claims.lock", missing):
            if index is not None:
                with replace_atomically(paths[index]) as partial, partial.open("wb") as file:
                    np.savez(file, **work(index))  # type: ignore[arg-type]
        return map(_load, paths)

    def claims(
        self, locks: Path, missing: Callable[[], Collection[int]]
    ) -> Generator[int | None, None, None]:
        """Yields, until none is missing, a piece of work that is this process's to do while it holds it.

        Yields None where others hold all that are missing; stop there, or ask again and so wait for them.
        What it yields are stretches of neighbours as long as may be.

        Args:
            locks: A file of this work, for the locks.
            missing: Numbers of what is yet to be done, ascending.

        Raises:
            OutputError: The file system has no locks.
            WorkerError: Another process died, failed, or stopped making progress.
        """
        try:
            file = locks.open("ab")
        except OSError as error:
            raise _cannot_write(locks.parent, error) from error
        with file:
            todo: list[int] = []
            following: int | None = None
            pause, waiting_since = self._pauses(), time.monotonic()
            while left := list(missing()):
                if left != todo:
                    todo, waiting_since = left, time.monotonic()
                if following is None:
                    following = todo[len(todo) * self.rank // self.size]
                for index in _candidates(todo, following):
                    with claim(file, index, _ELSEWHERE) as mine:
                        if mine and index in missing():
                            self.note(f"{locks.parent.name}/{index}")
                            yield index
                            following, pause = index + 1, self._pauses()
                            break
                else:
                    yield None
                    next(pause)
                    if time.monotonic() - waiting_since > self._patience["running"] and self._all_wait():
                        self._give_up(locks, todo)

    def _all_wait(self) -> bool:
        """Whether no live process of this job holds a claim: all that are running wait.

        One that hangs, or is slow, is for :meth:`_look` to judge.
        """
        for rank in range(self.size):
            if rank == self.rank or self._state(rank) != "running":
                continue
            content, since = self._seen.get(rank, (b"", 0.0))
            fresh = content != self._slot(rank) or time.monotonic() - since < 3 * BEAT_SECONDS
            if not fresh or self._read(rank).get("text") != WAITING:
                return False
        return True

    def _give_up(self, locks: Path, todo: list[int]) -> NoReturn:
        raise WorkerError(
            f"{locks.parent}: {len(todo)} of its files have been claimed by other processes for "
            f"{self._patience['running']:g} s (EVALKIT_STALL_SECONDS), and no process of this job hangs. "
            "Probably another job with the same work hangs: stop it, and run the same command again."
        )

    def note(self, text: str) -> None:
        """Record progress and check on the other processes, both at most every few seconds.

        Raises:
            WorkerError: One died or failed.
        """
        now = time.monotonic()
        if now - self._beaten > BEAT_SECONDS:
            self._knows_job()
            self._beaten, self._beats = now, self._beats + 1
            self._write(self._status, text)
        if now - self._watched > WATCH_SECONDS:
            self._look()

    def watched(self, progress: Progress | None) -> Progress:
        """Does the same as ``progress``, and notes it; only rank 0 shows its progress."""

        def report(stage: str, done: int, total: int) -> None:
            self.note(f"{stage}: {done:,} of {total:,}")
            if progress is not None and self.rank == 0:
                progress(stage, done, total)

        return report

    # ------------------------------------------------------------------------------- beginning and end

    def _begin(self) -> None:
        if self.rank == 0:
            self._job = uuid.uuid4().hex
            self._remove_old()
        # torchrun starts all ranks at the same time. They may start work before rank 0 is visible.
        until = time.monotonic() + MEET_SECONDS
        while not self._knows_job() and time.monotonic() < until:
            time.sleep(POLL_SECONDS[0])
        self._write("running", "beginning")
        self._acquire(_WRITTEN)

    def _remove_old(self) -> None:
        """Results that jobs of this address left when they were killed, and other jobs of long ago."""
        for folder in self._root.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
        for slots in self._root.parent.glob("*/team"):
            with contextlib.suppress(OSError):
                if time.time() - slots.stat().st_mtime > OLD_SECONDS:
                    shutil.rmtree(slots.parent, ignore_errors=True)

    def _knows_job(self) -> bool:
        """Whether rank 0 has begun, so that this process knows which job it is in."""
        # Rank 0 writes its slot before it takes this lock, so what is read is not of an earlier job.
        if not self._job and self._is_held(0, _WRITTEN):
            self._job = str(self._read(0).get("job", ""))
        return self._job != ""

    def _end(self) -> None:
        """Wait for the others, so that each one's death is noticed, and none is waited for that has ended."""
        self._wait(self._knows_job, "rank 0 to begin")
        if self.rank:
            self._write("done", "")
            # Absent: it has ended, and another job has its place already.
            self._wait(lambda: self._state(0) in ("done", "absent"), "rank 0 to end")
            return
        others = range(1, self.size)
        self._wait(lambda: all(self._state(rank) == "done" for rank in others), "all ranks to end")
        shutil.rmtree(self._root / self._job, ignore_errors=True)
        self._write("done", "")

    def _fail(self, error: BaseException) -> NoReturn:
        """Leave word of what ended this process, or say what ended the other that made torchrun end it."""
        with contextlib.suppress(OutputError):  # it is the reason, or hides it
            self._knows_job()
            if isinstance(error, SystemExit) and error.code == TERMINATED:
                self._write("terminated", "")
                self._look()
            elif self._status != "terminated":
                self._write("failed", str(error) if isinstance(error, EvalkitError) else repr(error))
        raise error

    def _acquire(self, which: int) -> None:
        until = time.monotonic() + JOIN_SECONDS
        while not try_claim(self._slots, self.rank * SLOT + which, _ELSEWHERE):
            if time.monotonic() > until:
                there = self._read(self.rank)
                raise WorkerError(
                    f"Rank {self.rank} of a job with the same address as this one is still running "
                    f"({_who(there)}): end it, or give torchrun another --rdzv-endpoint or --master-port."
                )
            time.sleep(0.05)

    # ---------------------------------------------------------------------------------------- the others

    def _wait(self, until: Callable[[], bool], what: str) -> None:
        pause = self._pauses()
        while not until():
            self.note(f"waiting for {what}")
            next(pause)

    def _pauses(self) -> Generator[None, None, None]:
        """Pauses of growing length, with a look at the others about every second."""
        begun, (pause, longest) = time.monotonic(), POLL_SECONDS
        looked = begun
        while True:
            time.sleep(pause)
            pause = min(1.5 * pause, longest)
            self.note(WAITING)
            if time.monotonic() - looked >= min(longest, min(self._patience.values()) / 4):
                self._look(waiting_since=begun)
                looked = time.monotonic()
            yield

    def _look(self, waiting_since: float | None = None) -> None:
        """Raise if another process died or failed or, while this one waits, makes no progress."""
        self._watched = now = time.monotonic()
        states = {rank: self._state(rank) for rank in range(self.size) if rank != self.rank}
        # What ended by itself is the reason for what torchrun ended after it.
        for state in ("failed", "died", "terminated"):
            for rank in (rank for rank, found in states.items() if found == state):
                self._raise(rank, state)
        for rank, state in states.items():
            content = self._slot(rank)
            if self._seen.get(rank, (None,))[0] != content:
                self._seen[rank] = content, now
            quiet = now - max(self._seen[rank][1], waiting_since or now)
            if state in self._patience and quiet > self._patience[state]:
                self._raise(rank, state)

    def _state(self, rank: int) -> str:
        """What a process of this job is: absent (yet), running, done, failed, terminated or died."""
        held = self._is_held(rank, _OWNED)  # before reading: a network file system then reads anew
        there = self._read(rank)
        if not self._job or there.get("job") != self._job:
            return "absent"
        state = str(there.get("state"))
        return "died" if state == "running" and not held else state

    def _raise(self, rank: int, state: str) -> NoReturn:
        there = self._read(rank)
        text = str(there.get("text"))
        how = {
            "absent": f"has not begun within {self._patience['absent']:g} s. Do all hosts run the same "
            f"command, with EVALKIT_CACHE on one file system that all of them see ({self._root})?",
            "running": f"made no progress for {self._patience['running']:g} s (EVALKIT_STALL_SECONDS); last "
            f"at: {text}.",
            "failed": f"failed: {text}",
            "terminated": "was ended by SIGTERM.",
            "died": f"died without reporting an error, as if killed or out of memory; last at: {text}.",
        }[state]
        who = "" if state == "absent" else f" ({_who(there)})"
        # Another has ended for a reason of its own, which is the better one.
        reason = text if state == "terminated" and text else f"Rank {rank}{who} {how}"
        self._write("terminated", reason)
        raise WorkerError(f"{reason} Stored results are kept: run the same command again to resume.")

    # ------------------------------------------------------------------------------------------- slots

    def _slot(self, rank: int) -> bytes:
        return os.pread(self._slots.fileno(), SLOT, rank * SLOT)

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            found = json.loads(self._slot(rank).rstrip(b"\0 ") or b"{}")
        except ValueError:  # in the middle of being written
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, state: str, text: str) -> None:
        self._status = state
        record = {"job": self._job, "state": state, "host": socket.gethostname(), "pid": os.getpid()}
        for length in range(SLOT // 2, 0, -32):
            content = json.dumps({**record, "beat": self._beats, "text": text[:length]}).encode()
            if len(content) <= SLOT:
                break
        try:
            os.pwrite(self._slots.fileno(), content.ljust(SLOT), self.rank * SLOT)
        except OSError as error:
            raise _cannot_write(self._root, error) from error

    def _is_held(self, rank: int, which: int) -> bool:
        byte = rank * SLOT + which
        # Shared, so that two who look at the same time do not take each other for the process itself.
        if not try_claim(self._slots, byte, _ELSEWHERE, exclusive=False):
            return True
        release(self._slots, byte)
        return False


def _stall_seconds() -> float:
    text = os.environ.get("EVALKIT_STALL_SECONDS", str(STALL_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"EVALKIT_STALL_SECONDS={text!r} in the environment: expected seconds above 0.")
    return seconds


def _cannot_write(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Cannot write in {folder}: {error.strerror}. Set EVALKIT_CACHE to a folder that all processes share."
    )


def _who(there: Mapping[str, Any]) -> str:
    return f"pid {there.get('pid')} on {there.get('host')}"


def _load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _candidates(todo: list[int], following: int) -> Iterator[int]:
    """In what order to try to claim ``todo``: what follows, the middle of the longest stretch, all others."""
    if following in todo:
        yield following
    # Where stretches end: each process works at the beginning of one.
    ends = [place for place in range(1, len(todo)) if todo[place] != todo[place - 1] + 1]
    begin, end = max(
        zip([0, *ends], [*ends, len(todo)], strict=True), key=lambda stretch: stretch[1] - stretch[0]
    )
    yield todo[(begin + end) // 2]
    yield from todo


@contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """SIGTERM, by which torchrun ends the others when one has failed, unwinds the stack."""

    def terminate(*_: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        with contextlib.suppress(TypeError):  # it was not set from Python
            signal.signal(signal.SIGTERM, before)
