"""Runs the command line on an input in the worker, and says what of the rules it broke.

The rules, of every command on every damaged file:

- It exits with 0 or 2 and shows no traceback; it does not crash.
- With 2, the message has at most 1,000 characters, is not empty and names the file.
- It takes at most 4 GB of memory and 60 s of processor time. Wall time does not count: a busy machine is no
  hang. A process that uses none at all for two minutes waits for something, which is one.
- No code of the file is run: the marker that a malicious pickle would make is not there.
- Nothing is half written: an output is absent after 2 and whole after 0, and no ``*.partial`` is left.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

LONGEST_MESSAGE = 1000
MOST_SECONDS = 60.0
MOST_MEMORY = 4 * 2**30
IDLE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command did; `code` is None where it ended with a traceback, a crash or not at all."""

    arguments: tuple[str, ...]
    code: int | None
    out: str = ""
    err: str = ""
    problem: str = ""
    memory: int = 0
    seconds: float = 0.0


class Worker:
    """The long-lived process; started anew after a crash or a hang."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.cache = folder / "cache"
        self._process: subprocess.Popen[str] | None = None

    def run(self, *arguments: object) -> Outcome:
        """One command."""
        if self._process is None:
            self._start()
        process, given = self._process, tuple(map(str, arguments))
        assert process is not None
        assert process.stdin is not None
        process.stdin.write(json.dumps({"arguments": given, "cache": str(self.cache)}) + "\n")
        process.stdin.flush()
        answer = self._answer(MOST_SECONDS)
        out, err = (self._text(name, 500_000) for name in ("out", "err"))
        if isinstance(answer, str):
            self.close()
            stacks = self._text("stacks", 30_000)
            return Outcome(arguments=given, code=None, out=out, err=err, problem=f"{answer}\n{stacks}")
        return Outcome(
            arguments=given,
            code=answer["code"],
            out=out,
            err=err,
            problem=answer["traceback"] or "",
            memory=answer["memory"],
            seconds=answer["seconds"],
        )

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()

    def _start(self) -> None:
        for name in ("out", "err", "stacks"):
            (self.folder / name).write_text("")
        script = Path(__file__).with_name("fuzz_worker.py")
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
            "EVALKIT_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            # As on a computer whose owner has not asked for development mode.
            "PYTHONDEVMODE": "",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self._process = subprocess.Popen(
            [sys.executable, script, *(self.folder / name for name in ("out", "err", "stacks"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if isinstance(answer := self._answer(600), str):
            raise RuntimeError(f"the worker does not start: {answer}\n{self._text('err', 3000)}")

    def _answer(self, seconds: float) -> dict[str, Any] | str:
        """The process's answer, or what befell it."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        begun = used = _processor_seconds(process.pid)
        moved = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not selector.select(timeout=0.5):
                if (now := _processor_seconds(process.pid)) > used + 0.01:
                    used, moved = now, time.monotonic()
                if used - begun > seconds or time.monotonic() - moved > IDLE_SECONDS:
                    process.send_signal(signal.SIGUSR1)  # has it write down where it is
                    time.sleep(0.5)
                    return f"hangs: {used - begun:.0f} s of processor time, and no end"
        line = process.stdout.readline()
        if not line:
            return f"crashed with exit status {process.wait()}"
        return {} if line == "ready\n" else dict(json.loads(line))

    def _text(self, name: str, most: int) -> str:
        with (self.folder / name).open("rb") as file:
            return file.read(most).decode(errors="replace")


def _processor_seconds(pid: int) -> float:
    """Of all threads of a process, in user and system mode."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def working(folder: Path) -> Iterator[Worker]:
    """A worker for as long as the block runs."""
    worker = Worker(folder)
    try:
        yield worker
    finally:
        worker.close()


def broken_rules(
    outcome: Outcome, names: Sequence[str], outputs: Sequence[Path] = (), marker: Path | None = None
) -> list[str]:
    """What of the rules the command broke, a sentence each.

    Args:
        outcome: What it did.
        names: What the message may call the file.
        outputs: What the command writes.
        marker: What a malicious file would make.
    """
    found = []
    if outcome.problem:
        found.append(_last_lines(outcome.problem))
    elif outcome.code not in (0, 2):
        found.append(f"exit code {outcome.code}")
    if not outcome.problem and ("Traceback (most recent call last)" in outcome.err):
        found.append(f"a traceback on stderr: {_last_lines(outcome.err)}")
    if outcome.code == 2:
        if not outcome.err.strip():
            found.append("no message")
        if len(outcome.err) > LONGEST_MESSAGE:
            found.append(f"a message of {len(outcome.err):,} characters: {outcome.err[:200]!r}")
        # A network that computes infinity: sound files of weights do that, too.
        if not any(name in outcome.err for name in (*names, "not finite")):
            found.append(f"the message does not name the file: {outcome.err[:300]!r}")
    if outcome.memory > MOST_MEMORY:
        found.append(f"{outcome.memory / 2**30:.1f} GiB of memory")
    if marker and marker.exists():
        marker.rmdir()
        found.append("code in the file was run")
    for output in outputs:
        found += _half_written(output, outcome.code)
    return found


def _half_written(output: Path, code: int | None) -> list[str]:
    found = [f"left behind: {path.name}" for path in output.parent.rglob("*.partial")]
    if code == 0 and not output.exists():
        found.append(f"exit code 0, and {output.name} is not there")
    if code == 2 and output.exists():
        found.append(f"exit code 2, and {output.name} is there")
    if code == 0 and output.exists():
        try:
            if output.suffix in (".npz", ".zip"):
                with zipfile.ZipFile(output) as archive:
                    assert archive.testzip() is None
            elif output.suffix == ".h5":
                with h5py.File(output) as file:
                    file.visititems(lambda _, node: node[()] if isinstance(node, h5py.Dataset) else None)
            elif output.is_file():
                assert output.stat().st_size > 0
        except Exception as error:
            found.append(f"{output.name} is not whole: {error!r}")
    return found


def _last_lines(text: str) -> str:
    """Of a traceback: the frames in the project, and how it ends."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if not lines[0].startswith("Traceback"):  # a crash or a hang: the innermost frame comes first
        return " | ".join(lines[:6])
    frames = [line for line in lines if re.search(r"/(evalkit|generation|reference_batches)/\S+\.py", line)]
    return " | ".join([*frames[-3:], *(line[:300] for line in lines[-2:])])


def fid(outcome: Outcome) -> float:
    """What ``compare --metrics fid --format json`` printed."""
    (score,) = json.loads(outcome.out)["scores"]
    return float(score["value"])


def same_number(a: float, b: float) -> bool:
    """Equal but for the order of the images in the sums."""
    return bool(np.isclose(a, b, rtol=1e-6, atol=1e-7))
