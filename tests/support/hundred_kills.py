"""Sampling, extraction and a sweep, killed a hundred times: `python hundred_kills.py FOLDER`.

Each job is killed at random moments and repeated until it comes to its end, then begun anew elsewhere. Prints
a JSON object; for each job: how often it was killed, the results of all its ends, and how much was made.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deaths
import numpy as np
import torch
from small_networks import load
from stand_ins import InceptionPixels

from evalkit.comparison import features_of
from generation import sample as sampling
from generation import work
from generation.batch import Networks
from generation.cost import describe_cost
from generation.settings import Settings
from generation.sweep import sweep

KILLS = 102
SETTINGS = Settings(count=16, scale=30.0, respacing="3", shard_size=4)
IMAGES = 20_000


class Job(ABC):
    """Work in a folder; calling it does it all, or what is left."""

    needed: int
    """Samples or images that it makes."""

    def __init__(self, out: Path, networks: Networks):
        self.out = out
        self.networks = networks

    @abstractmethod
    def __call__(self) -> None: ...

    @abstractmethod
    def digest(self) -> str:
        """Of its result."""

    def log(self, owner: type, name: str, size: Callable[[Any], int]) -> None:
        """Note the size of what a method is called with, before it makes anything."""
        original = getattr(owner, name)

        def noting(this: Any, given: Any, *rest: Any) -> Any:
            with (self.out / "made.log").open("a") as file:
                file.write(f"{size(given)}\n")
            return original(this, given, *rest)

        setattr(owner, name, noting)

    def made(self) -> int:
        """Samples or images that were begun."""
        return sum(map(int, (self.out / "made.log").read_text().split()))


class Sampling(Job):
    needed = SETTINGS.count

    def __call__(self) -> None:
        self.log(work._Maker, "__call__", lambda item: item.piece.end - item.piece.begin)
        sampling.run(SETTINGS, self.networks, self.out / "run", batch_size=2)

    def digest(self) -> str:
        return digest_of(self.out.glob("run/samples_*.npz"))


class Extraction(Job):
    needed = IMAGES

    def __call__(self) -> None:
        self.log(InceptionPixels, "__call__", len)
        images = self.out.parent / "images.npz"
        features = features_of(images, extractor=InceptionPixels(), store=self.out / "store")
        np.savez(self.out / "features.npz", **features.arrays)

    def digest(self) -> str:
        return digest_of(self.out.glob("features.npz"))


class Sweep(Job):
    needed = 2 * SETTINGS.count

    def __call__(self) -> None:
        os.environ["EVALKIT_CACHE"] = str(self.out / "cache")
        self.log(work._Maker, "__call__", lambda item: item.piece.end - item.piece.begin)
        sweep(
            SETTINGS,
            (0.0, 4.0),
            self.networks,
            self.out.parent / "reference.npz",
            self.out / "sweep",
            extractor=InceptionPixels(),
            batch_size=2,
        )

    def digest(self) -> str:
        files = [*self.out.glob("sweep/*/samples_*.npz"), self.out / "sweep" / "results.csv"]
        return digest_of([*files, self.out / "sweep" / "samples.png"])


def digest_of(files: Any) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
    networks = load(folder / "unet.safetensors", folder / "classifier.safetensors")
    describe_cost([SETTINGS], networks)  # kept for all: it takes more calls than the sampling
    random = np.random.default_rng(0)
    np.savez(folder / "images.npz", random.integers(0, 256, (IMAGES, 4, 4, 3), np.uint8))
    np.savez(folder / "reference.npz", random.integers(0, 256, (30, 8, 8, 3), np.uint8))
    found: dict[str, Any] = {}
    for kind in (Sampling, Extraction, Sweep):

        def begun(number: int, kind: type[Job] = kind) -> Job:
            out = folder / f"{kind.__name__}-{number}"
            out.mkdir()
            return kind(out, networks)

        alone = begun(0)
        calls = deaths.calls_of(alone)
        ends = [alone]
        killed, codes = 0, []
        while killed < KILLS / 3:
            job = begun(len(ends))
            kills, code = deaths.again_and_again(job, calls, seed=len(ends))
            killed += kills
            codes.append(code)
            ends.append(job)
        found[kind.__name__] = {
            "kills": killed,
            "codes": sorted(set(codes)),
            "digests": len({job.digest() for job in ends}),
            "wasted": sum(job.made() for job in ends) - len(ends) * kind.needed,
            "alone": alone.made() - kind.needed,
        }
        print(kind.__name__, found[kind.__name__], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
