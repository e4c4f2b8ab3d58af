"""pytorch-fid's own numbers, on CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import pytest
from cifar10 import cifar10
from peers import OF_40_IMAGES, PEERS
from stand_ins import NO_STORE

from evalkit.comparison import compare
from evalkit.extractors.inception_resizes import PytorchFid
from evalkit.extractors.weights import InceptionWeights


def fid(folder: Path, weights: InceptionWeights, count: int) -> float:
    return compare(
        *(cifar10(folder, split, count) for split in ("train", "test")),
        protocol="pytorch-fid",
        extractor=PytorchFid(weights, device="cpu"),
        run=NO_STORE,
    )["fid"]


def test_its_fid(big_data: Path, inception_weights: InceptionWeights) -> None:
    found = fid(big_data, inception_weights, 40)
    assert found == pytest.approx(PEERS["pytorch-fid"]["fid_of_40_images"], rel=OF_40_IMAGES)


@pytest.mark.slow
def test_its_fid_of_300_images(big_data: Path, inception_weights: InceptionWeights) -> None:
    found = fid(big_data, inception_weights, 300)
    assert found == pytest.approx(PEERS["pytorch-fid"]["fid"], rel=1e-4)
