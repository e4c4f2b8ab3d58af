"""clean-fid's own numbers, on CIFAR-10; and its KID, whose draws have no seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cifar10 import cifar10
from peers import OF_40_IMAGES, PEERS
from stand_ins import NO_STORE, stand_in
from torch import Tensor

from evalkit.comparison import compare
from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_network import INPUT_SIZE
from evalkit.extractors.inception_resizes import CleanFid, CleanFidLegacyPytorch
from evalkit.extractors.preprocess import resize_bicubic
from evalkit.extractors.weights import InceptionWeights
from evalkit.verify import pictures


class CleanFidScaledAsPytorch(CleanFid):
    """As the golden value was made: with clean-fid's network ``pytorch_inception``.

    That takes ``2x/255 - 1``. The one that its mode ``clean`` loads, and which takes ``(x - 128) / 128``,
    could not be had there.
    """

    @staticmethod
    def prepared(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return (2 * (resize_bicubic(images, INPUT_SIZE).clamp_(0, 255) / 255) - 1).to(dtype)


def fid(folder: Path, network: Inception, protocol: str, count: int = 300) -> float:
    batches = (cifar10(folder, split, count) for split in ("train", "test"))
    return compare(*batches, protocol=protocol, metrics="fid", extractor=network, run=NO_STORE)["fid"]


def test_its_fid(big_data: Path, inception_weights: InceptionWeights) -> None:
    found = fid(big_data, CleanFidScaledAsPytorch(inception_weights, device="cpu"), "clean-fid", 40)
    assert found == pytest.approx(PEERS["clean-fid"]["fid_clean_of_40_images"], rel=OF_40_IMAGES)


@pytest.mark.slow
def test_its_fid_of_300_images(big_data: Path, inception_weights: InceptionWeights) -> None:
    network = CleanFidScaledAsPytorch(inception_weights, device="cpu")
    assert fid(big_data, network, "clean-fid") == pytest.approx(PEERS["clean-fid"]["fid_clean"], rel=1e-4)


@pytest.mark.slow
def test_its_fid_in_the_mode_legacy_pytorch(big_data: Path, inception_weights: InceptionWeights) -> None:
    found = fid(big_data, CleanFidLegacyPytorch(inception_weights, device="cpu"), "clean-fid-legacy-pytorch")
    assert found == pytest.approx(PEERS["clean-fid"]["fid_legacy_pytorch"], rel=1e-4)


def test_its_kid_scatters_around_ours() -> None:
    """By the steps of clean-fid's ``kernel_distance``, with few images a draw, so that they scatter."""
    images = np.concatenate([np.roll(pictures(12, 10, 6), shift, axis=2) for shift in range(10)])
    network = stand_in(CleanFid.network)
    sides = images[::2], images[1::2]
    ours = compare(*sides, protocol="clean-fid", metrics="kid", extractor=network, run=NO_STORE)["kid"]
    x, y = (network(side)["pool"].astype(np.float64) for side in sides)
    random, draws, m = np.random.default_rng(0), [], 10

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    for _ in range(4000):
        a, b = (side[random.choice(len(side), m, replace=False)] for side in (x, y))
        within = kernel(a, a) + kernel(b, b)
        draws.append((within.sum() - np.trace(within)) / (m - 1) / m - 2 * kernel(a, b).mean())
    assert abs(np.mean(draws) - ours) < 4 * np.std(draws) / np.sqrt(len(draws))
    assert np.std(draws) > 0
