"""Sampling in processes that are killed, and repeated: `python sampling_deaths.py SCENARIO FOLDER`.

One process loads the networks and forks those that sample, each of which would otherwise take seconds to
start. Prints a JSON object: what happened, and the sha256 of each final file.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import deaths
import torch
from deaths import wait
from small_networks import load

from generation import sample as sampling
from generation import shards
from generation.batch import Networks
from generation.cost import describe_cost
from generation.settings import Settings

SETTINGS = Settings(count=16, scale=30.0, respacing="3", shard_size=3)


def work(folder: Path, networks: Networks, name: str) -> deaths.Work:
    """A run."""
    return lambda: sampling.run(SETTINGS, networks, folder / name, batch_size=2)


def killed_after(module: Any, name: str, count: int, this: deaths.Work) -> deaths.Work:
    """The work, which is killed after call number ``count`` of a function."""

    def dying() -> object:
        original, calls = getattr(module, name), [0]

        def stopping(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            result = original(*args, **kwargs)
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, stopping)
        return this()

    return dying


def at_random(folder: Path, networks: Networks) -> dict[str, Any]:
    """Killed again and again, until it comes to its end."""
    calls = deaths.calls_of(work(folder, networks, "counted"))
    kills, code = deaths.again_and_again(work(folder, networks, "killed"), calls)
    return {"kills": kills, "code": code}


def at_the_worst(folder: Path, networks: Networks) -> dict[str, Any]:
    """Before and after a file is renamed, while samples or the final file are written, before shards go."""
    this = work(folder, networks, "worst")
    dying = [
        deaths.dying_at_rename(1, this),  # the manifest
        deaths.dying_at_rename(1, this, after=True),
        deaths.dying_at_rename(1, this),  # the first batch
        deaths.dying_at_rename(1, this, after=True),
        killed_after(shards.np, "savez", 1, this),
        killed_after(shards.np, "savez", 9, this),
        killed_after(shards.NpzWriter, "append", 5, this),
        deaths.dying_at_rename(1, this),  # the final file
        killed_after(shards.ShardFolder, "_write_final", 1, this),
    ]
    codes = [wait(deaths.start(each)) for each in dying]
    left = len(list((folder / "worst").rglob("*.partial")))
    return {"codes": codes, "partials": left, "code": wait(deaths.start(this))}


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
    networks = load(folder / "unet.safetensors", folder / "classifier.safetensors")
    describe_cost([SETTINGS], networks)  # kept for all: it takes more calls than the sampling
    found = globals()[scenario](folder, networks)
    found["alone"] = wait(deaths.start(work(folder, networks, f"alone-{scenario}")))
    found["sha256"] = {
        path.parent.name.split("-")[0]: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*/samples_*.npz")
    }
    found["files"] = sorted({path.name for path in folder.glob("*/*")})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
