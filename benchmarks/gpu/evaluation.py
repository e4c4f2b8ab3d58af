"""Stages of acceptance.py: extraction, whole comparisons and `evalkit verify`."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from results import CUDA, guarded, reduced, report

from evalkit.extractors.inception import PRECISIONS, Inception
from evalkit.extractors.weights import load_weights

IMAGE_BYTES = 256 * 256 * 3


@contextmanager
def scratch(images: int) -> Iterator[tuple[Path, str]]:
    """A folder that so many images of 256x256 fit in, and where it is: in memory if there is room."""
    memory = Path("/dev/shm")
    fits = memory.exists() and shutil.disk_usage(memory).free > 1.5 * IMAGE_BYTES * images
    with tempfile.TemporaryDirectory(dir=memory if fits else None) as name:
        yield Path(name), "in memory" if fits else "on disk"


def verify() -> None:
    """The checks of `evalkit verify`, and its comparison with TensorFlow's features for each precision."""
    from evalkit.verify import against_recorded
    from evalkit.verify import verify as checks

    for check in checks(device=str(CUDA)):
        report(f"verify, {check.name}", check.passed, detail=check.detail)
    for precision in PRECISIONS:
        with guarded(f"verify, {precision}"):
            network = Inception(load_weights(), device=str(CUDA), precision=precision)
            report(f"verify, {precision}", against_recorded(network).detail)


def extraction() -> None:
    """Images per second of Inception, by stage from a file to the store."""
    from extraction import stages

    count = reduced(16_384)
    with scratch(count) as (folder, where):
        for precision, rates in stages(folder, count, PRECISIONS).items():
            for stage, rate in rates.items():
                report(f"{precision}, {stage}, images/s", rate, where=where)


def write_images(path: Path, n: int, seed: int) -> None:
    """An npz of images of 256x256, stored: 512 of smooth noise, shifted so that all differ."""
    from evalkit.images import NpzWriter

    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.random((512, 3, 32, 32), np.float32)).to(CUDA)
    smooth = F.interpolate(coarse, (256, 256), mode="bicubic").clamp(0, 1).mul(255).byte()
    with NpzWriter.create(path, (n, 256, 256, 3)) as writer:
        for first in range(0, n, 512):
            shifted = smooth[: n - first].roll((first % 251, first % 239), (2, 3)).permute(0, 2, 3, 1)
            writer.append(shifted.contiguous().cpu().numpy())


def compare() -> None:
    """A whole comparison of two npz files of 50,000 images of 256x256, as fast as it gets first."""
    from evalkit.comparison import compare as compare_batches

    weights, n = load_weights(), reduced(50_000, 16)
    with scratch(2 * n) as (folder, where):
        begin = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            for written in [
                pool.submit(write_images, folder / f"{side}.npz", n, seed)
                for seed, side in enumerate(("ref", "samples"))
            ]:
                written.result()
        report("two npz written", time.perf_counter() - begin, images=n, where=where)
        for precision in ("bfloat16", "float32"):
            for state in ("cold", "features stored"):
                with guarded(f"compare, {precision}, {state}"):
                    begin = time.perf_counter()
                    result = compare_batches(
                        str(folder / "ref.npz"),
                        str(folder / "samples.npz"),
                        metrics=["fid", "sfid", "precision_recall"],
                        extractor=Inception(weights, device=str(CUDA), precision=precision),
                        device=str(CUDA),
                        store=folder / "store",
                    )
                    took = time.perf_counter() - begin
                    scores = {score.name: (score.value, score.stderr) for score in result.scores}
                    stages = {stage: round(seconds, 2) for stage, seconds in result.seconds.items()}
                    report(f"compare {n} x {n}, {precision}, {state}, s", took, **scores, stages=stages)
