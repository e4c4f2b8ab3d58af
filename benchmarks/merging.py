"""Memory and time of merging a sampling run's shards into its npz. Needs disk space for twice the samples.

python benchmarks/merging.py                        # 50,000 images of 64x64, 0.6 GB
python benchmarks/merging.py --size 256             # of 256x256, 9.8 GB
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import peak_bytes

from evalkit.images import open_images
from generation.shards import ShardFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="a folder on a disk with enough space")
    arguments = parser.parse_args()
    shape = (arguments.images, arguments.size, arguments.size, 3)
    random = np.random.default_rng(0)
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as temporary,
        ShardFolder.open(
            Path(temporary) / "run", identity={}, made_with={}, shape=shape, shard_size=64
        ) as folder,
    ):
        for piece in folder.missing(64):
            images = random.integers(0, 256, (piece.end - piece.begin, *shape[1:]), dtype=np.uint8)
            folder.save(piece, images, {})
        before = peak_bytes()
        begin = time.perf_counter()
        assert folder.merge(np.zeros(arguments.images, np.int64))
        seconds = time.perf_counter() - begin
        after = peak_bytes()
        size = folder.final.stat().st_size
        assert open_images(folder.final).shape == shape[1:]
    print(f"{arguments.images:,} images of {arguments.size}x{arguments.size}, {size / 1e9:.2f} GB")
    print(f"merged in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s")
    print(f"peak memory {before / 1024**2:.0f} MiB before, {after / 1024**2:.0f} MiB after")


if __name__ == "__main__":
    main()
