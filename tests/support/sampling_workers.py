"""Workers of a sampling run as processes that are killed: `python sampling_workers.py SCENARIO FOLDER`.

One process loads the networks and forks the workers, each of which would otherwise take seconds to start.
Prints a JSON object: what happened, and the sha256 of each final file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deaths
import torch
from deaths import wait
from patience import until

from generation import sample as sampling
from generation import shards
from generation.batch import Networks
from generation.checkpoints import load_network
from generation.settings import Settings

SETTINGS = Settings(count=16, scale=30.0, respacing="3", shard_size=3)
sampling.POLL_SECONDS = 0.02


def work(
    folder: Path, networks: Networks, name: str, prepare: Callable[[], None] = lambda: None, **options: Any
) -> deaths.Work:
    """The work of one worker."""

    def sample() -> None:
        prepare()
        sampling.run(SETTINGS, networks, folder / name, batch_size=2, **options)

    return sample


def worker(folder: Path, networks: Networks, name: str, *prepare: Callable[[], None], **options: Any) -> int:
    """Start a worker; returns its process id."""
    return deaths.start(work(folder, networks, name, *prepare, **options))


def ended(pid: int) -> int | None:
    """Exit code, negative for a signal; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def stop_at(module: Any, name: str, count: int, how: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Make call number ``count`` of a function kill or halt its process after it has returned."""

    def prepare() -> None:
        original, calls = getattr(module, name), [0]

        def stopping(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            result = original(*args, **kwargs)
            if calls[0] == count:
                os.kill(os.getpid(), how)
            return result

        setattr(module, name, stopping)

    return prepare


def noting_shards(log: Path) -> Callable[[], None]:
    """Make a worker write the number of every shard that it makes to a file."""

    def prepare() -> None:
        original = sampling._Worker.make

        def noting(self: Any, shard: shards.Shard) -> Any:
            with log.open("a") as file:
                file.write(f"{shard.number}\n")
            return original(self, shard)

        sampling._Worker.make = noting  # type: ignore[method-assign]

    return prepare


def killed_at_random(folder: Path, networks: Networks) -> dict[str, Any]:
    """Kill a worker again and again, until one finishes."""
    calls = deaths.calls_of(work(folder, networks, "counted"))
    kills, code = deaths.again_and_again(work(folder, networks, "killed"), calls)
    return {"kills": kills, "code": code}


def killed_at_the_worst(folder: Path, networks: Networks) -> dict[str, Any]:
    """Before and after a file is renamed, while a shard or the final file is written, before shards go."""
    this = work(folder, networks, "worst")

    def at(module: Any, name: str, count: int) -> deaths.Work:
        return work(folder, networks, "worst", stop_at(module, name, count))

    dying = [
        deaths.dying_at_rename(1, this),  # the manifest
        deaths.dying_at_rename(1, this, after=True),
        deaths.dying_at_rename(1, this),  # the first shard
        deaths.dying_at_rename(1, this, after=True),
        at(shards.np, "savez", 1),
        at(shards.np, "savez", 4),
        at(shards.NpzWriter, "append", 5),
        deaths.dying_at_rename(1, this),  # the final file
        at(shards.ShardFolder, "_write_final", 1),
    ]
    codes = [wait(deaths.start(each)) for each in dying]
    left = len(list((folder / "worst").rglob("*.partial")))
    return {"codes": codes, "partials": left, "code": wait(deaths.start(this))}


def two(folder: Path, networks: Networks) -> dict[str, Any]:
    """Two workers at once; and two of which one halts after its second shard, until it is killed."""
    log, waits = folder / "shards.log", folder / "waits.log"
    pids = [worker(folder, networks, "two", noting_shards(log)) for _ in range(2)]
    codes = [wait(pid) for pid in pids]
    made = sorted(map(int, log.read_text().split()))
    halted = worker(folder, networks, "bereft", stop_at(sampling._Worker, "make", 2, signal.SIGSTOP))
    os.waitpid(halted, os.WUNTRACED)
    log.unlink()

    def prepare() -> None:
        noting_shards(log)()
        logging.getLogger("generation").setLevel(logging.INFO)
        logging.getLogger("generation").addHandler(logging.FileHandler(waits))

    bereft = worker(folder, networks, "bereft", prepare)
    until(lambda: waits.exists() and "waiting for them" in waits.read_text())
    waited = ended(bereft) is None
    left = sorted(set(made) - set(map(int, log.read_text().split())))
    os.kill(halted, signal.SIGKILL)
    bereft_codes = [wait(halted), wait(bereft)]
    return {"codes": codes, "made": made, "waited": waited, "left": left, "bereft": bereft_codes}


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
    networks = Networks.prepare(
        load_network(folder / "unet.safetensors"),
        load_network(folder / "classifier.safetensors"),
        precision="reference",
        device=torch.device("cpu"),
    )
    found = globals()[scenario](folder, networks)
    found["alone"] = wait(worker(folder, networks, f"alone-{scenario}"))
    found["sha256"] = {
        path.parent.name.split("-")[0]: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*/samples_*.npz")
    }
    found["files"] = sorted({path.name for path in folder.glob("*/*")})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
