"""Label balance: balanced, random, or neither."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from stand_ins import NO_STORE, InceptionPixels

from evalkit.batches import LabelBalance
from evalkit.comparison import compare
from evalkit.comparison.balance import label_balance

RNG = np.random.default_rng(0)
BALANCED = np.arange(50_000) % 1000
NEARLY = np.concatenate([BALANCED, np.arange(300)])


@pytest.mark.parametrize(
    ("labels", "expected", "words"),
    [
        (None, LabelBalance(kind="none"), "no labels"),
        (np.zeros(0, np.int64), LabelBalance(kind="none"), "no labels"),
        (
            BALANCED,
            LabelBalance(kind="balanced", classes=1000, least=50, most=50),
            "balanced, 1,000 classes of 50 images",
        ),
        (
            np.full(7, 3),
            LabelBalance(kind="balanced", classes=1, least=7, most=7),
            "balanced, 1 class of 7 images",
        ),
        (
            NEARLY,
            LabelBalance(kind="uneven", classes=1000, least=50, most=51),
            "uneven, 1,000 classes of 50 to 51 images",
        ),
        (
            np.repeat([0, 1], [100, 900]),
            LabelBalance(kind="uneven", classes=2, least=100, most=900),
            "uneven, 2 classes of 100 to 900 images",
        ),
        (
            np.array([1, 2, 2**40]),
            LabelBalance(kind="ids", classes=3, least=1, most=1),
            "ids, not classes",
        ),
    ],
)
def test_kinds(labels: NDArray[np.int64] | None, expected: LabelBalance, words: str) -> None:
    assert label_balance(labels) == expected
    assert str(expected) == words


@pytest.mark.parametrize(
    ("images", "classes"), [(50_000, 1000), (60, 10), (300, 1000), (10_000, 2), (50_000, 10)]
)
def test_labels_that_were_drawn_are_random(images: int, classes: int) -> None:
    """Also where most classes have one image or none. Equal counts by chance would be called balanced."""
    for _ in range(20):
        labels = RNG.integers(0, classes, images)
        counts = np.unique(labels, return_counts=True)[1]
        assert label_balance(labels).kind == ("random" if counts.min() < counts.max() else "balanced")


def test_a_comparison_records_both_sides(images: NDArray[np.uint8], tmp_path: object) -> None:
    np.savez(f"{tmp_path}/s.npz", images[30:], np.arange(30) % 10)
    found = compare(images[:30], f"{tmp_path}/s.npz", extractor=InceptionPixels(), run=NO_STORE)
    assert found.reference.labels == LabelBalance(kind="none")
    assert found.samples.labels == LabelBalance(kind="balanced", classes=10, least=3, most=3)
    assert (found.reference.source, found.samples.source) == ("<array>", f"{tmp_path}/s.npz")
    assert found.byte_rules.keys() == {"adm"}
    assert found.byte_rules["adm"].startswith("8-bit RGB")
    seen = {score.name: (score.outputs, score.reference) for score in found.scores}
    assert seen["fid"] == (("inception:pool",), "images")
    assert seen["inception_score"][1] == "nothing"
