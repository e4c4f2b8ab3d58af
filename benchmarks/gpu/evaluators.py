"""Stage of acceptance.py: an Evaluator in a training loop on the GPU, alone and with several processes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from results import CUDA, guarded, reduced, report
from torch import Tensor

from evalkit import Evaluator
from evalkit.comparison import compare
from evalkit.results import Comparison
from evalkit.system.ranks import Ranks
from evalkit.system.run import Run
from evalkit.verify import pictures

HOW = Run(device=str(CUDA), store=None)
SIZE = 64
ROWS: tuple[str, ...] = ("fid", "sfid", "kid", "precision_recall")
SUMS: tuple[str, ...] = ("fid",)
GIVEN = (37, 256, 1, 100)
"""Batch sizes, used in turn."""

PATIENCE = 30  # seconds


def main() -> None:
    """Scores against compare(), overhead, and several processes."""
    n = reduced(3000, 64)
    reference, samples = (pixels(n, seed) for seed in (0, 1))
    for metrics in (ROWS, SUMS):
        with guarded(f"evaluator, {' '.join(metrics)}"):
            for kind, values in (("bytes", samples), ("floats", as_floats(samples))):
                found = scores(reference, torch.from_numpy(values), metrics)
                report(
                    f"evaluator equals compare, {' '.join(metrics)}, {kind}", equal(found, right(n, metrics))
                )
    for size in (256, 32):
        with guarded(f"cost of an evaluator at {size}x{size}"):
            cost(size)
    with guarded("evaluator, two processes"):
        two_processes(n, reference, samples)
    with guarded("evaluator, NCCL"), gives_up("evaluator, NCCL"):
        nccl(n, reference, samples)


@cache
def right(n: int, metrics: tuple[str, ...]) -> Comparison:
    """The result of compare() on n images."""
    return compare(pixels(n, 0), pixels(n, 1), metrics=metrics, run=HOW)


@contextmanager
def gives_up(what: str) -> Iterator[None]:
    """Kill this process if the block takes too long."""

    def end() -> None:
        report(what, f"no answer in {PATIENCE} s")
        os._exit(0)

    timer = threading.Timer(PATIENCE, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def pixels(n: int, seed: int) -> NDArray[np.uint8]:
    """(n, 64, 64, 3) distinct images: smooth pictures with some noise."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 40, (n, SIZE, SIZE, 3), dtype=np.uint8)
    return noise + pictures(SIZE, SIZE, 16)[np.arange(n) % 16] // 2 + np.uint8(20 * seed)


def as_floats(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Floats in [-1, 1] that the evaluator converts back to the same bytes."""
    return (images.astype(np.float32) + np.float32(0.5)) / np.float32(127.5) - 1


def scores(reference: NDArray[np.uint8], samples: Tensor, metrics: tuple[str, ...]) -> Comparison:
    """Result of an evaluator that gets the samples on the GPU in uneven batches, NHWC."""
    evaluator = Evaluator(reference, metrics=metrics, value_range="-1..1", run=HOW)
    first = step = 0
    while first < len(samples):
        count = GIVEN[step % len(GIVEN)]
        evaluator.update(samples[first : first + count].to(CUDA))
        first, step = first + count, step + 1
    return evaluator.compute()


def equal(found: Comparison, expected: Comparison) -> bool:
    """Whether results are bit-identical, including error bars."""
    return found.scores == expected.scores and dict(found.missing) == dict(expected.missing)


def cost(size: int) -> None:
    """Time of an update in addition to the network."""
    from evaluator import measure

    _, seconds = measure(reduced(8192, 32), size, "fid,sfid")
    network = seconds.pop("network")
    shares = {name.replace(" ", "_"): round(each / network, 4) for name, each in seconds.items()}
    report(f"evaluator at {size}x{size}, network, us an image", 1e6 * network, **shares)


# Several processes -----------------------------------------------------------------------------------------


def two_processes(n: int, reference: NDArray[np.uint8], samples: NDArray[np.uint8]) -> None:
    """Two ranks of gloo on one GPU, each with half of the samples, against one process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "images.npz", reference=reference, samples=samples)
        spawn = multiprocessing.get_context("spawn")
        ranks = [spawn.Process(target=one_rank, args=(rank, folder)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(PATIENCE)
            rank.kill()
        for metrics in (ROWS, SUMS):
            found = [Comparison.from_json((folder / named(rank, metrics)).read_text()) for rank in range(2)]
            expected = right(n, metrics)
            report(
                f"evaluator, two processes with gloo, {' '.join(metrics)}, the scores of one",
                equal(found[0], expected),
                ranks_agree=equal(*found),
                differences=[
                    (mine.name, mine.value - theirs.value)
                    for mine, theirs in zip(found[0].scores, expected.scores, strict=True)
                ],
            )


def named(rank: int, metrics: tuple[str, ...]) -> str:
    return f"{'-'.join(metrics)}-{rank}.json"


def one_rank(rank: int, folder: Path) -> None:
    """Write the evaluator's result on one rank, which has half of the samples."""
    with guarded(f"evaluator, rank {rank}"):
        dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
        with np.load(folder / "images.npz") as images:
            reference, samples = images["reference"], images["samples"]
        half = len(samples) // 2
        mine = torch.from_numpy(samples[half:] if rank else samples[:half])
        for metrics in (ROWS, SUMS):
            (folder / named(rank, metrics)).write_text(scores(reference, mine, metrics).to_json())
        dist.destroy_process_group()


def nccl(n: int, reference: NDArray[np.uint8], samples: NDArray[np.uint8]) -> None:
    """An NCCL group with one process: the evaluator, and the collectives that several would use."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/join", rank=0, world_size=1)
        try:
            found = scores(reference, torch.from_numpy(samples), SUMS)
            report("evaluator, NCCL, equals compare", equal(found, right(n, SUMS)))
            device = Ranks()._device()
            numbers = torch.linspace(0, 1, 2048, dtype=torch.float64, device=device)
            total = numbers.clone()
            dist.all_reduce(total)
            told: list[Any] = [None]
            dist.all_gather_object(told, {"rank": 0})
            same = torch.equal(total, numbers) and told == [{"rank": 0}]
            report("NCCL's sums and objects", same, device=str(device))
        finally:
            dist.destroy_process_group()
