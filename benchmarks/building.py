"""Time of `evalkit reference build` and of a plain loop over Pillow, side by side in one run.

    python benchmarks/building.py                       # 400 photographs of about 500x375, made here
    python benchmarks/building.py --source imagenet/val --size 256

Both decode every image and crop it as ADM does; the loop collects the pixels in a list and saves them with
NumPy. Statistics are left out: their time is that of the network (see extraction.py). The pixels of both are
compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from reference_batches.build import Settings, build


def write_photographs(folder: Path, count: int) -> None:
    """Crops of scikit-learn's two photographs, about as large as ImageNet's images."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    random = np.random.default_rng(0)
    for index in range(count):
        width, height = random.integers(400, 600), random.integers(300, 427)
        photo = photos[index % 2]
        left, top = random.integers(0, photo.width - width), random.integers(0, photo.height - height + 1)
        photo.crop((left, top, left + width, top + height)).save(folder / f"{index:06d}.jpg", quality=95)


def plain_loop(paths: list[Path], size: int, out: Path) -> None:
    images: list[NDArray[np.uint8]] = []
    for path in paths:
        image: Image.Image = Image.open(path).convert("RGB")
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        images.append(np.asarray(image.crop((left, top, left + size, top + size))))
    np.savez(out, np.stack(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder of images")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        source = arguments.source or work / "photographs"
        if not arguments.source:
            source.mkdir()
            write_photographs(source, arguments.images)
        paths = sorted(path for path in source.rglob("*") if path.is_file())
        cores = os.cpu_count() or 1
        settings = Settings(size=arguments.size, statistics="none", labels="none")
        runs = {
            "plain loop": lambda: plain_loop(paths, arguments.size, work / "loop.npz"),
            "build, 1 worker": lambda: build(source, work / "one.npz", settings, workers=1),
            f"build, {cores} workers": lambda: build(source, work / "all.npz", settings, workers=cores),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
        loop, one, all_ = (np.load(work / f"{name}.npz")["arr_0"] for name in ("loop", "one", "all"))
        assert (loop == one).all(), "pixels differ"
        assert (loop == all_).all(), "pixels differ"
    rate = {name: len(paths) / statistics.median(times) for name, times in seconds.items()}
    print(f"{len(paths)} images to {arguments.size}x{arguments.size}, medians of {arguments.rounds} rounds\n")
    print("| | images/s | against the loop |\n|---|---|---|")
    for name, value in rate.items():
        print(f"| {name} | {value:.0f} | {value / rate['plain loop']:.2f} |")


if __name__ == "__main__":
    main()
