"""What Evaluator.update costs beside the network, per image, on this machine.

    python benchmarks/evaluator.py --images 128 --size 256

Batch by batch, the network alone and the evaluator take turns in this process on the same images. The
network gets bytes, and nothing is done with its features; the evaluator gets floats in [-1, 1], NCHW, in
batches of 32. What is summed up once in 512 images is timed by itself, and added. On a CPU, seconds are those
of the processor, which other programs change least.
"""

from __future__ import annotations

import time

import click
import numpy as np
import torch

from evalkit import Evaluator
from evalkit.extractors.inception import Inception
from evalkit.extractors.weights import load_weights
from evalkit.features.moments import Moments
from evalkit.features.store import SHARD
from evalkit.verify import pictures

BATCH = 32


@click.command()
@click.option("--images", default=128, show_default=True)
@click.option("--size", default=256, show_default=True)
@click.option("--metrics", default="fid,sfid", show_default=True)
def main(images: int, size: int, metrics: str) -> None:
    extractor = Inception(load_weights())
    on_gpu = extractor.device != "cpu"

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if on_gpu else time.process_time()

    shown = pictures(size, size, BATCH)
    floats = (torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 127.5 - 1).to(extractor.device)
    evaluator = Evaluator(shown[:4], metrics=metrics, value_range="-1..1", extractor=extractor, store=None)
    network = update = 0.0
    extractor(shown)
    for _ in range(0, images, BATCH):
        times = [clock()]
        for first in range(0, BATCH, extractor.batch_size):
            extractor(shown[first : first + extractor.batch_size])
        times.append(clock())
        evaluator.update(floats)
        times.append(clock())
        network += times[1] - times[0]
        update += times[2] - times[1]
    times = [clock()]
    for d in extractor.outputs.values():
        Moments(d).update(np.random.default_rng(0).random((SHARD, d), np.float32))
    times.append(clock())
    update += (times[1] - times[0]) * images / SHARD
    print(f"{extractor.device}, {images} images of {size}x{size}, {metrics}")
    print(f"network  {1000 * network / images:7.2f} ms an image")
    print(f"update   {1000 * update / images:7.2f} ms an image, {100 * (update / network - 1):.1f} % more")


if __name__ == "__main__":
    main()
