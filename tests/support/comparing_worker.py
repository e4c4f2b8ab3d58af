"""A process of a job that compares by pixels: `python comparing_worker.py VERB ...` is `evalkit VERB ...`.

The folder ``LOG`` tells what each rank extracted. ``TROUBLE`` is what happens to one: its rank, the number of
the forward pass, and ``kill``, ``stop``, ``hang``, ``late``, ``slow`` or ``fail``. With ``TOGETHER`` set, no
rank extracts before all are about to. Shards, groups and blocks are small, so that there are many.

Without a verb it is a server of such processes, which are forked and so need not load everything again: a
line of JSON, ``{"arguments", "environment", "folder", "out", "err"}``, starts one and is answered with its
process id, a process id with its exit code (null while it runs). For them, time is that of ``LOG/clock``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from patience import until
from shared_clock import SharedClock
from stand_ins import InceptionPixels as Pixels

import evalkit.report.text  # noqa: F401 - loaded once, for all
import reference_batches.fetch  # noqa: F401 - loaded once, for all
from evalkit.cli import root as cli
from evalkit.cli.options import ExtractorSetup
from evalkit.errors import EvalkitError
from evalkit.features import extraction, store
from evalkit.metrics import screening
from evalkit.system import distributed
from evalkit.system.processes import rank, world_size

BATCH_SECONDS = 0.01


class WallClock:
    """That of processes which torchrun starts."""

    sleep = staticmethod(time.sleep)

    def leave(self) -> None:
        pass


clock: WallClock | SharedClock = WallClock()
# Processes that share a clock, by their ids.
forked: dict[int, SharedClock] = {}
codes: dict[int, int] = {}


class Watched(Pixels):
    batch_size = 16
    calls = 0

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        me, size = rank(), world_size()
        log = Path(os.environ["LOG"])
        self.calls += 1
        if "TOGETHER" in os.environ and self.calls == 1:
            (log / f"begun-{me}").touch()
            while len(list(log.glob("begun-*"))) < size:
                clock.sleep(0.01)
        troubled, call, how = os.environ.get("TROUBLE", "-1 0 none").split()
        if str(me) == troubled and how == "slow":
            clock.sleep(0.2 if int(call) <= self.calls < int(call) + 12 else 0)
        elif str(me) == troubled and how == "late" and 0 <= self.calls - int(call) < 2:
            clock.sleep(1)  # a part that takes longer than a stalled process may, and then is not finished
        elif how == "late" and (str(me), self.calls) == (troubled, int(call) + 2):
            trouble("hang")
        elif (str(me), str(self.calls)) == (troubled, call):
            (log / "trouble.partial").write_text(str(os.getpid()))
            (log / "trouble.partial").rename(log / "trouble")
            trouble(how)
        elif how == "kill" and str(self.calls) == call and isinstance(clock, WallClock):
            # Or this one might do all the work before the other one gets as far.
            until((log / "trouble").exists)
            until(lambda: is_dead(int((log / "trouble").read_text())))
        with (log / f"extracted-{me}").open("a") as file:
            file.write(f"{len(images)}\n")
        clock.sleep(BATCH_SECONDS)
        return super().__call__(images)


def trouble(how: str) -> None:
    if how == "fail":
        raise EvalkitError("The moon is in the wrong place.")
    clock.leave()
    if how == "hang":
        while True:
            signal.pause()
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])


def is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def start(order: dict[str, Any]) -> int:
    """Fork a process; returns its id."""
    global clock
    shared = Path(order["environment"]["LOG"]) / "clock", int(order["environment"]["RANK"])
    if pid := os.fork():
        forked[pid] = SharedClock(*shared)
        return pid
    code = 70
    try:
        for number, path in enumerate((os.devnull, order["out"], order["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        clock = SharedClock(*shared)
        distributed.time = clock  # type: ignore[assignment]
        distributed.WATCH_SECONDS = 0.2
        sys.argv[1:] = order["arguments"]
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    """Exit code of one; that any has ended, however it did, the clock is told here."""
    while forked:
        done, status = os.waitpid(-1, os.WNOHANG)
        if not done:
            break
        codes[done] = os.waitstatus_to_exitcode(status)
        forked[done].leave()
        forked.pop(done).close()
    return codes.get(pid)


def main() -> None:
    store.SHARD = 64
    extraction.GROUP = 3
    screening.CPU_TILE = (16, 32)
    distributed.WATCH_SECONDS = 0.0
    distributed.BEAT_SECONDS = 0.1
    distributed.MEET_SECONDS = 1.0
    torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
    ExtractorSetup.extractor = lambda self, network=None: Watched()  # type: ignore[method-assign]
    if sys.argv[1:]:
        cli.main()
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(start(order) if isinstance(order, dict) else ended(order)), flush=True)


if __name__ == "__main__":
    main()
