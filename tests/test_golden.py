"""The reference evaluator's own numbers on CIFAR-10, from the genuine convolutions and a stand-in head."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inception_graphdef import standin_head
from numpy.typing import NDArray
from PIL import Image

from evalkit.comparison import compare
from evalkit.extractors.inception import Inception
from evalkit.extractors.weights import InceptionWeights
from evalkit.metrics.kernel_subsets import SubsetKernelDistance
from evalkit.results import Comparison

GOLDEN = json.loads((Path(__file__).parent / "golden" / "evaluator_cifar10.json").read_text())
CASES = {case["images_each"]: case for case in GOLDEN["cases"]}
PEERS = json.loads((Path(__file__).parent / "golden" / "peers_cifar10.json").read_text())


def cifar10(folder: Path, split: str, count: int) -> NDArray[np.uint8]:
    """The first ``count`` images after the permutation of the golden values, (count, 32, 32, 3)."""
    with np.load(folder / "data" / "cifar10_jpeg.npz", allow_pickle=False) as data:
        indices = np.flatnonzero(data["is_test"] == (split == "test"))
        chosen = indices[np.random.RandomState(0).permutation(len(indices))[:count]]
        jpeg, offsets = data["jpeg"], data["offsets"]
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()))) for i in chosen]
    )


def evaluate(folder: Path, weights: InceptionWeights, count: int) -> dict[str, Comparison]:
    network = Inception(dataclasses.replace(weights, head=standin_head()), device="cpu")
    batches = cifar10(folder, "train", count), cifar10(folder, "test", count)
    found = {
        protocol: compare(*batches, protocol=protocol, extractor=network) for protocol in ("adm", "exact")
    }
    kid = SubsetKernelDistance(subset_size=PEERS["torch-fidelity"]["kid_subset_size"])
    return found | {"kid": compare(*batches, metrics=kid, extractor=network)}


def check(found: dict[str, Comparison], case: dict[str, Any]) -> None:
    reference, exact = case["reference_evaluator"], case["exact_float32_features_float64_algebra"]
    adm = found["adm"]
    assert adm["fid"] == pytest.approx(reference["fid"], abs=1e-4)
    assert adm["sfid"] == pytest.approx(reference["sfid"], abs=1e-3)
    assert adm["inception_score"] == pytest.approx(reference["inception_score_standin_head"], abs=1e-4)
    assert adm["precision"] == pytest.approx(
        reference["precision"], abs=max(0.002, 1 / adm.samples.images) + 1e-9
    )
    assert adm["recall"] == pytest.approx(reference["recall"], abs=max(0.002, 1 / adm.samples.images) + 1e-9)
    assert found["exact"]["fid"] == pytest.approx(exact["fid"], abs=1e-5)
    assert found["exact"]["sfid"] == pytest.approx(exact["sfid"], abs=1e-4)
    assert found["exact"]["precision"] == exact["precision"]
    assert found["exact"]["recall"] == exact["recall"]


def test_300_images(big_data: Path, inception_weights: InceptionWeights) -> None:
    found = evaluate(big_data, inception_weights, 300)
    check(found, CASES[300])
    kid, expected = found["kid"].score("kid_subsets"), PEERS["torch-fidelity"]
    assert kid is not None
    assert kid.value == pytest.approx(expected["kernel_inception_distance_mean"], abs=1e-6)
    assert kid.std == pytest.approx(expected["kernel_inception_distance_std"], abs=1e-6)


@pytest.mark.slow
def test_2000_images(big_data: Path, inception_weights: InceptionWeights) -> None:
    check(evaluate(big_data, inception_weights, 2000), CASES[2000])
