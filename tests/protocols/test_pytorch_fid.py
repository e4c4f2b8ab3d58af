"""pytorch-fid's own number, on CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import pytest
from cifar10 import cifar10
from peers import PEERS
from stand_ins import NO_STORE

from evalkit.comparison import compare
from evalkit.extractors.inception_resizes import PytorchFid
from evalkit.extractors.weights import InceptionWeights


def test_its_fid(big_data: Path, inception_weights: InceptionWeights) -> None:
    found = compare(
        *(cifar10(big_data, split, 300) for split in ("train", "test")),
        protocol="pytorch-fid",
        extractor=PytorchFid(inception_weights, device="cpu"),
        run=NO_STORE,
    )
    assert found["fid"] == pytest.approx(PEERS["pytorch-fid"]["fid"], rel=1e-4)
