"""Does this installation reproduce the reference implementations? Checks against independent ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg

from evalkit.errors import EvalkitError, MissingDependencyError
from evalkit.extractors.inception import Inception
from evalkit.extractors.weights import InceptionWeights, load_weights
from evalkit.metrics.frechet import frechet_distance
from evalkit.metrics.inception_score import inception_score
from evalkit.metrics.precision_recall import precision_recall

__all__ = ["Check", "against_recorded", "pictures", "state_dict", "verify"]

GRAPH_TOLERANCE = 2e-4
TORCH_FIDELITY_TOLERANCE = 1e-4
SIZES = ((8, 8), (32, 32), (64, 64), (256, 256), (299, 299), (512, 512), (120, 200))

Features = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: ``passed`` is None where it could not run, and ``detail`` says what was seen or why not."""

    name: str
    passed: bool | None
    detail: str


def pictures(height: int, width: int, count: int = 2) -> NDArray[np.uint8]:
    """Pictures with gradients, edges and fine texture, the same on every machine: integer arithmetic alone.

    Returns:
        (count, height, width, 3) uint8.
    """
    y, x = np.mgrid[:height, :width].astype(np.int64)
    images = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        for channel in range(3):
            gradient = (x * 255 // width) * (channel + 1) + (y * 255 // height) * (index + 1)
            radius = (x * 2 - width) ** 2 * height + (y * 2 - height) ** 2 * width
            disc = 90 * (radius < width * height * (width + height) // (5 + index + channel))
            texture = (x * y * (7 + channel) + x * 13 * (index + 1)) % 61
            images[index, :, :, channel] = (gradient + disc + texture) % 256
    return images


def verify(
    *, weights: str | Path | None = None, graph: str | Path | None = None, device: str = "auto"
) -> list[Check]:
    """Run every check that this machine allows.

    Args:
        weights: Inception weights; None for what ``load_weights`` finds.
        graph: ``classify_image_graph_def.pb``, to compare with TensorFlow running it; None skips that.
        device: Where our network runs.

    Raises:
        WeightsError: No weights were found, or not the genuine ones.
    """
    loaded = load_weights(weights)
    head = "with" if loaded.head is not None else "without"
    checks = [
        Check(
            name="weights",
            passed=loaded.genuine,
            detail=f"{loaded.container} {head} classifier head, digest {loaded.digest[:16]}…",
        )
    ]
    ours = Inception(loaded, device=device)
    checks.append(against_recorded(ours))
    checks.append(
        _attempt("features against TensorFlow running the graph", lambda: _against_graph(ours, graph))
    )
    checks.append(_attempt("features against torch-fidelity", lambda: _against_torch_fidelity(ours)))
    checks += _metrics()
    return checks


def _attempt(name: str, run: Callable[[], tuple[bool, str]]) -> Check:
    try:
        passed, detail = run()
    except MissingDependencyError as error:
        return Check(name=name, passed=None, detail=str(error))
    except EvalkitError as error:
        return Check(name=name, passed=False, detail=str(error))
    return Check(name=name, passed=passed, detail=detail)


def against_recorded(ours: Inception, sizes: Sequence[tuple[int, int]] = SIZES) -> Check:
    """Compare with features that TensorFlow gave for these pictures, shipped with the package.

    Args:
        ours: The network.
        sizes: Heights and widths of the pictures, some of :data:`SIZES`.
    """
    with np.load(str(files("evalkit") / "verify_features.npz"), allow_pickle=False) as recorded:
        differences = [
            float(
                np.abs(ours(pictures(height, width, 1))[layer] - recorded[f"{layer}_{height}x{width}"]).max()
            )
            for height, width in sizes
            for layer in ("pool", "spatial")
        ]
    return Check(
        name="features against TensorFlow's, recorded",
        passed=max(differences) <= GRAPH_TOLERANCE,
        detail=_largest(max(differences), GRAPH_TOLERANCE, sizes),
    )


def _against_graph(ours: Inception, graph: str | Path | None) -> tuple[bool, str]:
    if graph is None:
        raise MissingDependencyError("no graph given; name classify_image_graph_def.pb with --graph")
    from evalkit.extractors.inception_graph import InceptionGraph

    with InceptionGraph(graph) as reference:
        difference = _difference(ours, reference, ("pool", "spatial"))
    return difference <= GRAPH_TOLERANCE, _largest(difference, GRAPH_TOLERANCE)


def _against_torch_fidelity(ours: Inception) -> tuple[bool, str]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(f"torch-fidelity cannot be imported ({error})") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(state_dict(ours.weights), file)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))

    def reference(images: NDArray[np.uint8]) -> Features:
        with torch.inference_mode():
            return {"pool": network(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy()}

    difference = _difference(ours, reference, ("pool",))
    return difference <= TORCH_FIDELITY_TOLERANCE, _largest(difference, TORCH_FIDELITY_TOLERANCE)


def _difference(
    ours: Inception, reference: Callable[[NDArray[np.uint8]], Features], layers: tuple[str, ...]
) -> float:
    largest = 0.0
    for height, width in SIZES:
        images = pictures(height, width)
        a, b = ours(images), reference(images)
        largest = max(largest, *(float(np.abs(a[layer] - b[layer]).max()) for layer in layers))
    return largest


def _largest(difference: float, tolerance: float, sizes: Sequence[tuple[int, int]] = SIZES) -> str:
    inputs = ", ".join(f"{width}x{height}" for height, width in sizes)
    return f"largest difference {difference:.1e} (allowed {tolerance:.0e}) for inputs of {inputs}"


def state_dict(weights: InceptionWeights) -> dict[str, Any]:
    """The weights as torch-fidelity and pytorch-fid load them; a missing head becomes zeros."""
    state = {name: torch.from_numpy(np.array(values)) for name, values in weights.convolutions.items()}
    for name in [name for name in state if name.endswith(".bn.bias")]:
        state[name.removesuffix("bias") + "weight"] = torch.ones_like(state[name])
        state[name.removesuffix("bias") + "num_batches_tracked"] = torch.tensor(0)
    head = np.zeros((2048, 1008), np.float32) if weights.head is None else weights.head
    return state | {"fc.weight": torch.from_numpy(head.T.copy()), "fc.bias": torch.zeros(1008)}


def _metrics() -> Iterator[Check]:
    """Metrics on made features against textbook formulas, written out here once more."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((64, 64)) / 8
    a = (generator.standard_normal((500, 64)) @ mixing).astype(np.float32)
    b = (generator.standard_normal((400, 64)) @ mixing + 0.1).astype(np.float32)

    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    difference = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    expected = difference @ difference + sum(map(np.trace, covariances)) - 2 * np.trace(root.real)
    yield _close("Fréchet distance against SciPy's sqrtm", frechet_distance(a, b), float(expected), 1e-6)

    probabilities = np.exp(a.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    divergence = (probabilities * np.log(probabilities / probabilities.mean(0))).sum(1).mean()
    score = inception_score(a, split_size=5000)[0]
    yield _close("Inception Score against its definition", float(score), float(np.exp(divergence)), 1e-5)

    def distances(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
        squared: NDArray[np.float64] = (x[:, None].astype(np.float64) - y[None]) ** 2
        return squared.sum(-1)  # type: ignore[no-any-return]

    radii = [np.sort(distances(x, x), axis=1)[:, 3] for x in (a, b)]
    between = distances(a, b)
    brute = (between <= radii[0][:, None]).any(0).mean(), (between <= radii[1]).any(1).mean()
    found = precision_recall(a, b, k=3, arithmetic="exact")
    for name, mine, other in zip(("Precision", "Recall"), found, brute, strict=True):
        yield _close(f"{name} against brute force", mine, float(other), 0)


def _close(name: str, mine: float, other: float, tolerance: float) -> Check:
    detail = f"{mine:.9g} and {other:.9g} (allowed {tolerance:g} apart)"
    return Check(name=name, passed=abs(mine - other) <= tolerance, detail=detail)
