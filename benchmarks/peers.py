"""Compare whole tools on the same images: time, peak memory and value, each run in a separate process.

    python benchmarks/peers.py --images 200               # FID: ours, OpenAI's arithmetic and three packages
    python benchmarks/peers.py --images 2000 --whole      # all metrics: ours against the reference evaluator
    python benchmarks/peers.py --images 50000 --size 256 --whole --ours    # without it, on a GPU

The packages are installed without dependencies into a temporary environment that sees the packages of this
one; the table gives the reason for those that cannot be installed or run. The runs alternate; the table gives
medians. Seconds start after imports and include loading the network. The images are crops of photographs
from scikit-learn; few images make covariances singular, and then the result of `sqrtm` is noise.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from measure import peak_bytes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "support"))

Run = Callable[[Path], dict[str, float]]

# The folder `work` holds a.npz, b.npz; or a/, b/ with the same images as PNG; weights.pth; graph.pb; store/.


def peers_without_downloads(module: Any, work: Path) -> None:
    """Let a package read the weights from a file instead of downloading them."""
    import torch

    module.load_state_dict_from_url = lambda *_, **__: torch.load(work / "weights.pth", weights_only=True)


def with_torchvision() -> None:
    """Import torchvision even if it was built for another torch: define the operators that it misses.

    No peer calls them.
    """
    from torch import library

    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(missing[1], "(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return


def torch_fidelity() -> Run:
    with_torchvision()
    from torch_fidelity import calculate_metrics

    def run(work: Path) -> dict[str, float]:
        found = calculate_metrics(
            input1=str(work / "b"),
            input2=str(work / "a"),
            fid=True,
            cuda=False,
            cache=False,
            verbose=False,
            feature_extractor_weights_path=str(work / "weights.pth"),
        )
        return {"fid": found["frechet_inception_distance"]}

    return run


def pytorch_fid() -> Run:
    with_torchvision()
    from pytorch_fid import fid_score, inception

    def run(work: Path) -> dict[str, float]:
        peers_without_downloads(inception, work)
        folders = [str(work / "a"), str(work / "b")]
        return {"fid": float(fid_score.calculate_fid_given_paths(folders, 50, "cpu", 2048, num_workers=0))}

    return run


def clean_fid() -> Run:
    with_torchvision()
    import torch
    from cleanfid import features, fid, inception_pytorch

    def run(work: Path) -> dict[str, float]:
        peers_without_downloads(inception_pytorch, work)
        cpu = torch.device("cpu")
        # Its default network is fetched from elsewhere; this one of its own takes the weights at hand.
        network = features.feature_extractor("pytorch_inception", device=cpu, use_dataparallel=False)
        value = fid.compute_fid(
            str(work / "a"),
            str(work / "b"),
            custom_feat_extractor=lambda images: network(images.to(cpu)),
            device=cpu,
            num_workers=0,
            verbose=False,
        )
        return {"fid": float(value)}

    return run


def reference(*, whole: bool) -> Run:
    import metrics
    import tensorflow  # noqa: F401

    from evalkit.extractors.inception_graph import InceptionGraph

    def run(work: Path) -> dict[str, float]:
        network = InceptionGraph(work / "graph.pb")
        a, b = (network(np.load(work / f"{side}.npz")["arr_0"]) for side in ("a", "b"))
        values = {"fid": metrics.reference_frechet(a["pool"], b["pool"])[0]}
        if whole:
            distances = metrics.tensorflow_distances()
            assert distances is not None
            values["sfid"] = metrics.reference_frechet(a["spatial"], b["spatial"])[0]
            neighbours = metrics.reference_precision_recall(distances)(a["pool"], b["pool"])
            values |= dict(zip(("precision", "recall"), neighbours, strict=True))
        return values

    return run


def evalkit(*, whole: bool, precision: str = "float32", stored: bool = False) -> Run:
    from evalkit.comparison import compare
    from evalkit.extractors.inception import Inception

    def run(work: Path) -> dict[str, float]:
        sides = (work / "a.npz", work / "b.npz") if whole else (work / "a", work / "b")
        comparison = compare(
            *sides,
            metrics=["fid", "sfid", "precision", "recall"] if whole else ["fid"],
            extractor=Inception(precision=precision),
            error_bars=False,  # the others have none
            run=Run(store=work / "store" if stored else None),
        )
        parts = {f"{stage}, s": seconds for stage, seconds in comparison.seconds.items()}
        return {score.name: score.value for score in comparison.scores} | parts

    return run


# Name: how it is made, whether it needs the throw-away environment, why its FID is not ours.
FID: dict[str, tuple[Callable[[], Run], bool, str]] = {
    "TensorFlow graph + sqrtm (OpenAI's evaluator)": (lambda: reference(whole=False), False, "`sqrtm`"),
    "torch-fidelity": (torch_fidelity, True, "`sqrtm`"),
    "pytorch-fid": (pytorch_fid, True, "resizes with half-pixel centres; `sqrtm`"),
    "clean-fid": (clean_fid, True, "resizes with Pillow's antialiased bicubic; `sqrtm`"),
    "evalkit": (lambda: evalkit(whole=False), False, ""),
    "evalkit, bfloat16": (lambda: evalkit(whole=False, precision="bfloat16"), False, "rounding of features"),
}
WHOLE: dict[str, tuple[Callable[[], Run], bool, str]] = {
    "OpenAI's arithmetic": (lambda: reference(whole=True), False, "`sqrtm`"),
    "evalkit, cold": (lambda: evalkit(whole=True), False, ""),
    "evalkit, reference stored": (lambda: evalkit(whole=True, stored=True), False, ""),
    "evalkit, bfloat16, reference stored": (
        lambda: evalkit(whole=True, precision="bfloat16", stored=True),
        False,
        "rounding of features",
    ),
}


def prepare(work: Path, count: int, size: int, *, whole: bool) -> None:
    """Everything that a run reads."""
    import torch
    from inception_graphdef import build_graph
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from evalkit.extractors.inception import Inception
    from evalkit.extractors.weights import load_weights
    from evalkit.features.extraction import extract
    from evalkit.images import NpzWriter, open_images
    from evalkit.verify import state_dict

    random = np.random.default_rng(0)
    for side, photograph in zip(("a", "b"), load_sample_images().images, strict=True):
        rows, columns = (random.integers(0, extent - size + 1, count) for extent in photograph.shape[:2])
        (work / side).mkdir()
        with NpzWriter.create(work / f"{side}.npz", (count, size, size, 3)) as writer:
            for index, (y, x) in enumerate(zip(rows, columns, strict=True)):
                image = photograph[y : y + size, x : x + size]
                writer.append(image[None])
                if not whole:
                    Image.fromarray(image).save(work / side / f"{index:06d}.png")
    weights = load_weights()
    torch.save(state_dict(weights), work / "weights.pth")
    build_graph(work / "graph.pb", weights.convolutions, None)
    if whole:
        for precision in ("float32", "bfloat16"):
            network = Inception(weights, precision=precision)
            extract(open_images(work / "a.npz"), network, run=Run(store=work / "kept"))


def install(folder: Path) -> str:
    """The Python of a throw-away environment with the packages; those that fail are missed by their run."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    for package in ("torch-fidelity", "pytorch-fid", "clean-fid", "torchvision"):
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-deps", package], stderr=subprocess.DEVNULL
        )
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    (Path(site.decode().strip()) / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return str(python)


def run_here(name: str, work: Path) -> None:
    """One run; its result is the last line of standard output."""
    run = (FID | WHOLE)[name][0]()
    begin = time.perf_counter()
    values = run(work)
    seconds = time.perf_counter() - begin
    print("\n" + json.dumps({"seconds": seconds, "GiB": peak_bytes() / 1024**3, "values": values}))


def one_run(python: str, name: str, work: Path) -> dict[str, Any] | str:
    """What :func:`run_here` printed, or why it did not."""
    shutil.rmtree(work / "store", ignore_errors=True)
    if (work / "kept").exists():
        shutil.copytree(work / "kept", work / "store")
    command = [python, __file__, "--run", name, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:120]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@click.command()
@click.option("--images", default=200, show_default=True, help="Images of each side.")
@click.option("--size", default=64, show_default=True, help="Side of the images, pixels.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--whole", is_flag=True, help="All metrics, ours against the reference evaluator's arithmetic.")
@click.option("--ours", is_flag=True, help="Without the reference evaluator, which runs on the CPU.")
@click.option("--run", "name", hidden=True)
@click.option("--work", type=click.Path(path_type=Path), hidden=True)
def main(
    images: int, size: int, rounds: int, whole: bool, ours: bool, name: str | None, work: Path | None
) -> None:
    if name is not None:
        assert work is not None
        run_here(name, work)
        return
    tools = WHOLE if whole else FID
    if ours:
        tools = {tool: how for tool, how in tools.items() if tool.startswith("evalkit")}
    results: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        prepare(work, images, size, whole=whole)
        python = sys.executable if whole or ours else install(work / "environment")
        for _ in range(rounds):
            for tool, (_, elsewhere, _) in tools.items():
                if tool not in reasons:
                    result = one_run(python if elsewhere else sys.executable, tool, work)
                    if isinstance(result, str):
                        reasons[tool] = result
                    else:
                        results[tool].append(result)
    print(f"{images} against {images} images of {size}x{size}, medians of {rounds} alternating runs\n")
    print("| | seconds | times the first one's speed | peak, GiB | values | why not ours |")
    print("|---|---|---|---|---|---|")
    reference_runs = next(iter(results.values()))
    for tool, (_, _, why) in tools.items():
        if tool in reasons:
            print(f"| {tool} | skipped: {reasons[tool]} | | | | |")
            continue
        seconds, peak = (statistics.median(run[key] for run in results[tool]) for key in ("seconds", "GiB"))
        values = ", ".join(f"{key} {value:.6g}" for key, value in results[tool][-1]["values"].items())
        ratios = [
            theirs["seconds"] / run["seconds"]
            for theirs, run in zip(reference_runs, results[tool], strict=False)
        ]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        print(f"| {tool} | {seconds:.1f} | {ratio} | {peak:.2f} | {values} | {why} |")


if __name__ == "__main__":
    main()
