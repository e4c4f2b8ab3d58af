"""Images per second of our Inception network, of TensorFlow running the graph, and of torch-fidelity.

    python benchmarks/extraction.py --images 64 --rounds 5
    python benchmarks/extraction.py --images 20000 --stages

All take turns in this process, on the same images; in a round, each makes one pass over the images. The table
gives the median over the rounds, and the median of the ratios within a round, which changes of the machine's
speed affect least. Needs the packages of `make test`.

With --stages, only our network, in each precision: the network alone, from host memory, and from an npz file
into the store. That is the one for a GPU; it needs nothing but evalkit.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.extractors.inception import PRECISIONS, Inception
from evalkit.extractors.inception_graph import InceptionGraph
from evalkit.extractors.inception_network import INPUT_SIZE
from evalkit.extractors.preprocess import scaled_input
from evalkit.extractors.weights import load_weights
from evalkit.features.extraction import Extraction, Wanted
from evalkit.features.shards import Shards
from evalkit.images import NpzWriter, open_images
from evalkit.system.devices import float32_arithmetic
from evalkit.system.engine import Pending
from evalkit.system.run import Run
from evalkit.verify import pictures, state_dict

Images = NDArray[np.uint8]


def rate(run: Callable[[], int], seconds: float) -> float:
    """Images per second of ``run``, which returns how many it begins; the first call warms up."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    run()
    synchronize()
    begin, done, calls = time.perf_counter(), 0, 0
    while time.perf_counter() - begin < seconds:
        done += run()
        calls += 1
        if calls % 4 == 0:  # else what is measured is how fast work is queued
            synchronize()
    synchronize()
    return done / (time.perf_counter() - begin)


@torch.inference_mode()
def resident(extractor: Inception, size: int = 256, seconds: float = 2.0) -> float:
    """Images per second of images that are on the device: the resize and the network alone."""
    layers = extractor._layers
    images = torch.from_numpy(pictures(size, size, 8)).to(layers.device)
    images = images.repeat(-(-extractor.batch_size // 8), 1, 1, 1)[: extractor.batch_size]

    def run() -> int:
        layers(scaled_input(images, INPUT_SIZE, layers.dtype))
        return len(images)

    with float32_arithmetic(tf32=extractor.precision == "tf32"):
        return rate(run, seconds)


def from_memory(extractor: Inception, size: int = 256, seconds: float = 2.0) -> float:
    """Images per second from arrays to features, both in host memory, two batches submitted ahead."""
    images = np.concatenate([pictures(size, size, 8)] * (extractor.batch_size // 8 or 1))
    waiting: deque[Pending] = deque()

    def run() -> int:
        waiting.append(extractor.submit(images))
        if len(waiting) > 2:
            waiting.popleft().result()
        return len(images)

    return rate(run, seconds)


def from_file(extractor: Inception, file: Path, store: Path) -> dict[str, float]:
    """Images per second of the stages from a file into the store and back, each by itself.

    Args:
        extractor: The network.
        file: Images in a file; its hash is computed, unless the cache has it.
        store: An empty folder.
    """
    extractor(pictures(256, 256, min(extractor.batch_size, 512)))  # loads, and compiles
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        seconds[stage] = time.perf_counter() - begin

    images = open_images(file)
    timed("hash", images.identify)
    timed("read", lambda: sum(len(batch) for batch in images.batches(256)))
    outputs = tuple(extractor.outputs)
    wanted = Wanted(extractor=extractor, arrays=outputs)
    run = Run(store=store)
    timed("extract into the store", Shards(images, {extractor: extractor.outputs}, run).extract_missing)
    timed("read the store", Extraction(images, [wanted], run=run).features)
    return {stage: len(images) / time_ for stage, time_ in seconds.items()}


def write_images(file: Path, count: int, size: int = 256) -> None:
    """An npz of that many pictures, no two the same."""
    some = pictures(size, size, 64)
    with NpzWriter.create(file, (count, size, size, 3)) as writer:
        for first in range(0, count, len(some)):
            writer.append((some[: count - first] + np.uint8(first // len(some) % 256)).astype(np.uint8))


def stages(folder: Path, count: int, precisions: Iterable[str]) -> dict[str, dict[str, float]]:
    """Images per second of every stage, by precision: ``count`` images of 256x256 in an npz in ``folder``."""
    file = folder / "images.npz"
    write_images(file, count)
    weights = load_weights()
    found: dict[str, dict[str, float]] = {}
    for precision in precisions:
        extractor = Inception(weights, precision=precision)
        found[precision] = {
            "resident": resident(extractor),
            "from memory": from_memory(extractor),
            **from_file(extractor, file, folder / f"store-{precision}"),
        }
    return found


def print_stages(count: int) -> None:
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EVALKIT_CACHE"] = f"{folder}/cache"
        found = stages(Path(folder), count, PRECISIONS if gpu else ("float32", "bfloat16"))
    names = list(next(iter(found.values())))
    print(f"Images/s, {count} images of 256x256\n")
    print(f"| precision | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for precision, rates in found.items():
        print(f"| {precision} | {' | '.join(f'{rates[name]:,.0f}' for name in names)} |")


def torch_fidelity(file: Path, batch_size: int) -> Callable[[Images], Any]:
    """torch-fidelity's extractor, with the batch size of its own command."""
    if importlib.util.find_spec("torchvision") is None:
        from stand_ins import torchvision_modules

        sys.modules.update(torchvision_modules())
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(state_dict(load_weights()), file)
    network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(file))

    def run(images: Images) -> None:
        with torch.inference_mode():
            for batch in torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size):
                network(batch)

    return run


@click.command()
@click.option("--images", "count", default=64, show_default=True, help="Images per pass.")
@click.option("--size", default=256, show_default=True, help="Side of the images, pixels.")
@click.option("--rounds", default=5, show_default=True)
@click.option(
    "--graph",
    type=click.Path(exists=True, path_type=Path),
    help="The published graph. Built if not given.",
)
@click.option("--stages", "by_stage", is_flag=True, help="Only our network, in each precision, by stage.")
def main(count: int, size: int, rounds: int, graph: Path | None, by_stage: bool) -> None:
    if by_stage:
        print_stages(count)
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
    from inception_graphdef import build_graph

    images = pictures(size, size, count)
    weights = load_weights()
    with tempfile.TemporaryDirectory() as folder:
        if graph is None:
            graph = build_graph(Path(folder) / "graph.pb", weights.convolutions, None)
        peers: dict[str, Callable[[Images], Any]] = {
            "TensorFlow graph, float32 (the reference)": InceptionGraph(graph),
            "torch-fidelity, float32": torch_fidelity(Path(folder) / "weights.pth", 64),
            "evalkit, float32": Inception(weights),
            "evalkit, bfloat16": Inception(weights, precision="bfloat16"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for round_ in range(rounds + 1):
            for name, run in peers.items():
                begin = time.perf_counter()
                run(images)
                if round_:  # the first pass warms up
                    seconds[name].append(time.perf_counter() - begin)
    reference = seconds["TensorFlow graph, float32 (the reference)"]
    fidelity = seconds["torch-fidelity, float32"]
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{count} images of {size}x{size}, {rounds} rounds, {device}, torch {torch.__version__}\n")
    print("| network | images/s | against TensorFlow | against torch-fidelity |\n|---|---|---|---|")
    for name, own in seconds.items():
        ratios = [
            statistics.median(peer / mine for peer, mine in zip(other, own, strict=True))
            for other in (reference, fidelity)
        ]
        print(f"| {name} | {count / statistics.median(own):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
