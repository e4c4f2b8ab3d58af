"""Peak memory of comparing two npz files of 50,000 images of 256x256.

    python benchmarks/memory.py --images 50000
    python benchmarks/memory.py --images 50000 --classes 1000

The whole path runs at full size: the files are read to the end, features are stored and read, and every
metric is computed. Only the network is spared most of its work: it runs on the first images, and the others
get random features around theirs. So its memory counts, and its hours do not. Writes 2 GB of features to a
temporary folder.

With ``--classes``, the scores within so many classes are computed instead, of random features.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from measure import peak_bytes
from numpy.typing import NDArray

from evalkit.comparison import compare
from evalkit.extractors.inception import Inception
from evalkit.features.record import Features
from evalkit.results import Comparison
from evalkit.system.run import Run
from evalkit.verify import pictures

SIZE = 256


class Prefix(Inception):
    """Inception for the first images; random features around theirs for the others."""

    real = 64

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Features of real images, then features drawn around them."""
        if not hasattr(self, "seen"):
            self.seen: list[dict[str, NDArray[np.float32]]] = []
            self.random = np.random.default_rng(0)
        if sum(len(features["pool"]) for features in self.seen) < self.real:
            self.seen.append(super().__call__(images))
            return self.seen[-1]
        drawn = {}
        for layer in self.outputs:
            known = np.concatenate([features[layer] for features in self.seen])
            weights = self.random.dirichlet(np.full(len(known), 0.3), len(images)).astype(np.float32)
            noise = self.random.standard_normal((len(images), known.shape[1]), np.float32)
            drawn[layer] = np.abs(weights @ known + 0.2 * noise)
        return drawn


def write(path: Path, count: int, shift: int) -> None:
    """An npz of ``count`` images, all of whose rows are the same, so that 10 GB deflate to little."""
    images = np.repeat(pictures(SIZE, SIZE, 8)[:, shift : shift + 1], SIZE, axis=1)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIZE, SIZE, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        for begin in range(0, count, len(images)):
            member.write(images[: count - begin].tobytes())


def labelled(name: str, images: int, classes: int, seed: int) -> Features:
    """Random features of Inception's width, with as many images of every class, in random order."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(images) % classes)
    scales = np.arange(1, 2049, dtype=np.float32) ** -0.4
    centres = np.random.default_rng(0).standard_normal((classes, 2048), np.float32)
    rows = np.empty((images, 2048), np.float32)
    for start in range(0, images, 1000):
        block = slice(start, start + 1000)
        noise = random.standard_normal(rows[block].shape, np.float32)
        rows[block] = np.maximum(scales * (noise * (1 + seed / 10) + centres[labels[block]]), 0)
    return Features(
        name=name,
        digest=name,
        network="inception",
        extractor="random",
        fingerprint="random",
        arrays={"pool": rows},
        labels=labels,
    )


def show(comparison: Comparison, begin: float, cpu: float) -> None:
    peak = peak_bytes() / 1024**3
    size = comparison.reference.images, comparison.samples.images
    seconds = f"{time.perf_counter() - begin:.0f} s, {time.process_time() - cpu:.0f} s of CPU time"
    print(f"{size[0]:,} against {size[1]:,} images: peak {peak:.2f} GiB, {seconds}")
    print({stage: round(seconds, 1) for stage, seconds in comparison.seconds.items()})


@click.command()
@click.option("--images", default=50_000, show_default=True, help="Images in each of the two files.")
@click.option("--classes", default=0, help="Compute the scores within so many classes.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Run on files made before (used by this script)."
)
def main(images: int, classes: int, folder: Path | None) -> None:
    if classes:
        sides = [labelled(name, images, classes, seed) for seed, name in enumerate(("ref", "samples"))]
        begin, cpu = time.perf_counter(), time.process_time()
        show(compare(*sides, metrics="class_fid,class_precision_recall", run=Run(store=None)), begin, cpu)
        return
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            for file, shift in (("ref.npz", 0), ("samples.npz", 9)):
                write(Path(name) / file, images, shift)
            # In a process of its own, so that writing the files does not count.
            subprocess.run([sys.executable, __file__, "--folder", name], check=True)
        return
    begin, cpu = time.perf_counter(), time.process_time()
    comparison = compare(
        folder / "ref.npz", folder / "samples.npz", extractor=Prefix(), run=Run(store=folder / "store")
    )
    show(comparison, begin, cpu)


if __name__ == "__main__":
    main()
