"""Images per second of our Inception network, of TensorFlow running the graph, and of torch-fidelity.

    python benchmarks/extraction.py --images 64 --rounds 5

All take turns in this process, on the same images; in a round, each makes one pass over the images. The table
gives the median over the rounds, and the median of the ratios within a round, which changes of the machine's
speed affect least. Needs the packages of `make test`.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_graph import InceptionGraph
from evalkit.extractors.weights import load_weights
from evalkit.verify import pictures, state_dict

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from inception_graphdef import build_graph
from stand_ins import torchvision_modules

Images = NDArray[np.uint8]


def torch_fidelity(file: Path, batch_size: int) -> Callable[[Images], Any]:
    """torch-fidelity's extractor, with the batch size of its own command."""
    if importlib.util.find_spec("torchvision") is None:
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
def main(count: int, size: int, rounds: int, graph: Path | None) -> None:
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
