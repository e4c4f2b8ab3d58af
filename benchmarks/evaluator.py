"""What Evaluator.update costs beside the network, per image, on this machine.

    python benchmarks/evaluator.py --images 96 --size 256

The evaluator gets floats in [-1, 1], NCHW, in batches of 32. On a CPU, its time is split into that in calls
of the network and the rest, in seconds of the processor, which other programs change least. On a GPU, which
works while the next batch is prepared, the network alone and the evaluator take turns instead. What is summed
up once in 512 images is timed by itself, and added.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from evalkit import Evaluator
from evalkit.extractors.base import Rows
from evalkit.extractors.inception import Inception
from evalkit.extractors.weights import load_weights
from evalkit.features.moments import Moments
from evalkit.features.store import SHARD
from evalkit.system.engine import Pending
from evalkit.verify import pictures

BATCH = 32


class Timed(Inception):
    """Adds up the time in its calls."""

    seconds = 0.0

    def clock(self) -> float:
        """Seconds: of the processor on a CPU, of the wall on a GPU."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def submit(self, images: NDArray[Any]) -> Pending[Mapping[str, Rows]]:
        """As before, timed where the features are there when it returns."""
        if self.device != "cpu":
            return super().submit(images)
        begin = self.clock()
        found = super().submit(images)
        self.seconds += self.clock() - begin
        return found


def measure(images: int, size: int, metrics: str) -> tuple[str, dict[str, float]]:
    """The device, and seconds for each image: of the network, beside it, and of the sums."""
    extractor = Timed(load_weights())
    shown = pictures(size, size, BATCH)
    floats = (torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 127.5 - 1).to(extractor.device)
    evaluator = Evaluator(shown[:4], metrics=metrics, value_range="-1..1", extractor=extractor, store=None)
    rows = [np.random.default_rng(0).random((SHARD, d), np.float32) for d in extractor.outputs.values()]
    begin = extractor.clock()
    for each in rows:
        Moments(each.shape[1]).update(each)
    sums = (extractor.clock() - begin) / SHARD

    evaluator.update(floats)
    evaluator.reset()
    network = update = extractor.seconds = 0.0
    for _ in range(0, images, BATCH):
        begin = extractor.clock()
        if extractor.device != "cpu":
            extractor(shown)
            network += extractor.clock() - begin
            begin = extractor.clock()
        evaluator.update(floats)
        update += extractor.clock() - begin
    network += extractor.seconds
    return extractor.device, {
        "network": network / images,
        "beside it": (update - network) / images,
        "sums": sums,
    }


@click.command()
@click.option("--images", default=96, show_default=True)
@click.option("--size", default=256, show_default=True)
@click.option("--metrics", default="fid,sfid", show_default=True)
def main(images: int, size: int, metrics: str) -> None:
    device, seconds = measure(images, size, metrics)
    print(f"{device}, {images} images of {size}x{size}, {metrics}")
    network = seconds.pop("network")
    print(f"network {1000 * network:8.2f} ms an image")
    for name, more in (seconds | {"together": sum(seconds.values())}).items():
        print(f"{name:10}{1000 * more:6.2f} ms an image, {100 * more / network:.1f} %")


if __name__ == "__main__":
    main()
