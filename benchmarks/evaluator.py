"""Overhead of Evaluator.update over the network alone, per image, on this machine.

    python benchmarks/evaluator.py --images 96 --size 256

The evaluator gets floats in [-1, 1], NCHW, in batches of 32. On a CPU, its time is split into calls of the
network and the rest, measured as CPU time, which other programs affect least. Sums, which are updated once
per 512 images, are timed separately and added. On a GPU, which computes while the next batch is prepared,
all updates and sums are timed together, and compared with the network on bytes in host memory; use thousands
of images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click
import numpy as np
import torch
from extraction import from_memory
from numpy.typing import NDArray
from torch import Tensor

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
    """Accumulates the CPU time of its calls, in seconds."""

    seconds = 0.0

    def submit(self, images: NDArray[Any]) -> Pending[Mapping[str, Rows]]:
        """Timed call; on a CPU, the features are complete when it returns."""
        begin = time.process_time()
        found = super().submit(images)
        self.seconds += time.process_time() - begin
        return found


def measure(images: int, size: int, metrics: str) -> tuple[str, dict[str, float]]:
    """The device, and seconds per image: of the network, of the overhead, and on a CPU of the sums."""
    extractor = Timed(load_weights())
    shown = pictures(size, size, BATCH)
    floats = (torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 127.5 - 1).to(extractor.device)
    evaluator = Evaluator(shown[:4], metrics=metrics, value_range="-1..1", extractor=extractor, store=None)
    if extractor.device != "cpu":
        return extractor.device, _on_gpu(extractor, evaluator, floats, images, size)
    rows = [np.random.default_rng(0).random((SHARD, d), np.float32) for d in extractor.outputs.values()]
    begin = time.process_time()
    for each in rows:
        Moments(each.shape[1]).update(each)
    sums = (time.process_time() - begin) / SHARD

    evaluator.update(floats)
    evaluator.reset()
    extractor.seconds = 0.0
    begin = time.process_time()
    for _ in range(0, images, BATCH):
        evaluator.update(floats)
    update, network = time.process_time() - begin, extractor.seconds
    return "cpu", {"network": network / images, "beside it": (update - network) / images, "sums": sums}


def _on_gpu(
    extractor: Inception, evaluator: Evaluator, floats: Tensor, images: int, size: int
) -> dict[str, float]:
    network = 1 / from_memory(extractor, size)
    for timed in (False, True):
        evaluator.reset()
        begin = time.perf_counter()
        for _ in range(0, images if timed else 2 * SHARD, BATCH):
            evaluator.update(floats)
        torch.cuda.synchronize()
    return {"network": network, "beside it": (time.perf_counter() - begin) / images - network}


@click.command()
@click.option("--images", default=96, show_default=True)
@click.option("--size", default=256, show_default=True)
@click.option("--metrics", default="fid,sfid", show_default=True)
def main(images: int, size: int, metrics: str) -> None:
    device, seconds = measure(images, size, metrics)
    print(f"{device}, {images} images of {size}x{size}, {metrics}")
    network = seconds.pop("network")
    print(f"network {1000 * network:8.2f} ms per image")
    for name, more in (seconds | {"together": sum(seconds.values())}).items():
        print(f"{name:10}{1000 * more:6.2f} ms per image, {100 * more / network:.1f} %")


if __name__ == "__main__":
    main()
