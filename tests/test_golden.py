"""The reference evaluator's own numbers on CIFAR-10, from the genuine convolutions and a stand-in head.

And torch-fidelity's, which come from the same features.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cifar10 import cifar10
from inception_graphdef import standin_head
from peers import PEERS

from evalkit.comparison import compare
from evalkit.extractors.inception import Inception
from evalkit.extractors.weights import InceptionWeights
from evalkit.metrics.kernel_subsets import SubsetKernelDistance
from evalkit.protocols import protocol_named
from evalkit.results import Comparison

GOLDEN = json.loads((Path(__file__).parent / "golden" / "evaluator_cifar10.json").read_text())
CASES = {case["images_each"]: case for case in GOLDEN["cases"]}
PEER = PEERS["torch-fidelity"]


def evaluate(folder: Path, weights: InceptionWeights, count: int) -> dict[str, Comparison]:
    network = Inception(dataclasses.replace(weights, head=standin_head()), device="cpu")
    batches = cifar10(folder, "train", count), cifar10(folder, "test", count)
    found = {
        protocol: compare(*batches, protocol=protocol, extractor=network) for protocol in ("adm", "exact")
    }
    fid, inception_score, kid = protocol_named("torch-fidelity").metrics
    assert isinstance(kid, SubsetKernelDistance)
    kid = dataclasses.replace(kid, subset_size=PEER["kid_subset_size"])
    metrics = [fid, inception_score, kid]
    found["torch-fidelity"] = compare(*batches, protocol="torch-fidelity", metrics=metrics, extractor=network)
    return found


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
    fid, inception, kid = found["torch-fidelity"].scores
    assert (fid.name, inception.name, kid.name) == ("fid", "inception_score", "kid")
    assert fid.value == pytest.approx(PEER["frechet_inception_distance"], rel=1e-4)
    assert inception.value == pytest.approx(PEER["inception_score_mean"], rel=1e-4)
    assert inception.std == pytest.approx(PEER["inception_score_std"], rel=1e-4)
    assert kid.value == pytest.approx(PEER["kernel_inception_distance_mean"], abs=1e-6)
    assert kid.std == pytest.approx(PEER["kernel_inception_distance_std"], abs=1e-6)


@pytest.mark.slow
def test_2000_images(big_data: Path, inception_weights: InceptionWeights) -> None:
    check(evaluate(big_data, inception_weights, 2000), CASES[2000])
