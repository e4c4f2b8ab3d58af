"""Time of identifying a batch by a hash of its content, compared with extracting its features.

python benchmarks/identity.py [--images 2000] [--rounds 3]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from evalkit.extractors.inception import Inception
from evalkit.images import open_images

TEN_GIGABYTES = 1e10
EXTRACTED = 64


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@click.command()
@click.option("--images", default=2000, show_default=True, help="Images of 256x256 in the file.")
@click.option("--rounds", default=3, show_default=True, help="The table gives medians over them.")
def main(images: int, rounds: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 256, 256, 3), dtype=np.uint8)
    extractor = Inception()
    extractor(pixels[:8])
    rows: dict[str, list[float]] = {"stored npz": [], "deflated npz": [], "remembered": [], "Inception": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EVALKIT_CACHE"] = f"{folder}/cache"
        stored, deflated = Path(folder, "stored.npz"), Path(folder, "deflated.npz")
        np.savez(stored, pixels)
        np.savez_compressed(deflated, pixels)
        time.sleep(3)  # results for files that were just written are not remembered
        for _ in range(rounds):
            for record in Path(folder).glob("cache/contents/*.json"):
                record.unlink()
            rows["stored npz"].append(seconds(lambda: open_images(stored).digest) / images)
            rows["remembered"].append(seconds(lambda: open_images(stored).digest) / images)
            rows["deflated npz"].append(seconds(lambda: open_images(deflated).digest) / images)
            rows["Inception"].append(seconds(lambda: extractor(pixels[:EXTRACTED])) / EXTRACTED)
    median = {name: statistics.median(times) for name, times in rows.items()}
    click.echo("| | images/s | share of extraction | 10 GB, s |")
    click.echo("|---|---|---|---|")
    for name, each in median.items():
        whole = (
            "" if name in ("Inception", "remembered") else f"{TEN_GIGABYTES / pixels[0].nbytes * each:.1f}"
        )
        click.echo(f"| {name} | {1 / each:,.0f} | {each / median['Inception']:.2%} | {whole} |")


if __name__ == "__main__":
    main()
