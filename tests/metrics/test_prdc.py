"""dgm-eval's precision and recall against prdc's formula written out, and what is drawn of large sides."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
from clouds import CLOUDS, exact_distances
from stand_ins import batch

from evalkit.errors import InputError, UndefinedMetricError
from evalkit.metrics.base import influence_of
from evalkit.metrics.density_coverage import DensityCoverage
from evalkit.metrics.prdc import (
    DrawnDensityCoverage,
    StrictPrecisionRecall,
    drawn,
    strict_precision_recall,
)
from evalkit.metrics.precision_recall import precision_recall
from evalkit.system.run import Run

CPU = Run(store=None, device="cpu")


def rows(n, seed, offset=0.0):
    return (np.random.default_rng(seed).normal(size=(n, 6)) + offset).astype(np.float32)


def by_definition(r, s, k):
    """As ``compute_prdc`` of the package prdc, with exact distances."""
    radii_r, radii_s = (np.sort(exact_distances(side, side), axis=1)[:, k] for side in (r, s))
    between = exact_distances(r, s)
    return (between < radii_r[:, None]).any(axis=0).mean(), (between < radii_s).any(axis=1).mean()


@pytest.mark.parametrize(
    "name",
    ["few dimensions", "lattice, full of ties", "duplicates"],
)
def test_it_is_the_definition(name):
    r, s = CLOUDS[name]
    for k in (1, 5) if "lattice" in name else (5,):
        assert strict_precision_recall(r, s, k=k) == by_definition(r, s, k)


def test_points_on_the_sphere_are_outside():
    """Samples at distance 1 of a reference on a line of integers, whose nearest neighbours are at 1."""
    r = np.array([[0, 0], [1, 0], [2, 0]], np.float32)
    s = np.array([[1, 1], [0.5, 0], [9, 9]], np.float32)
    assert strict_precision_recall(r, s, k=1)[0] == pytest.approx(1 / 3)
    assert precision_recall(r, s, k=1)[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", [StrictPrecisionRecall(k=3), DrawnDensityCoverage(k=3)])
def test_of_large_sides_as_many_are_drawn_whatever_their_order(metric):
    r, s = rows(80, 0), rows(60, 1, 0.4)
    few = replace(metric, images=50)
    found = [score.value for score in few(batch(pool=r), batch(pool=s), CPU)]
    again = [score.value for score in few(batch(pool=r[::-1]), batch(pool=s[::-1]), CPU)]
    assert found == again
    chosen = drawn(r, s, 50)
    assert [len(side) for side in chosen] == [50, 50]
    assert {row.tobytes() for row in chosen[0]} < {row.tobytes() for row in r}
    assert found == [score.value for score in metric(batch(pool=chosen[0]), batch(pool=chosen[1]), CPU)]
    assert found != [score.value for score in metric(batch(pool=r), batch(pool=s), CPU)]
    bars = influence_of(few, batch(pool=r), batch(pool=s), CPU)
    of_chosen = influence_of(metric, batch(pool=chosen[0]), batch(pool=chosen[1]), CPU)
    for name, bar in bars.items():
        assert (bar.images, bar.stderr) == (50, of_chosen[name].stderr)
    # The larger side is cut to the smaller, as in dgm-eval.
    assert [len(side) for side in drawn(r, s, 10_000)] == [60, 60]
    assert drawn(s, s, 10_000)[0] is s


@pytest.mark.parametrize("metric", [StrictPrecisionRecall(k=3), DrawnDensityCoverage(k=3)])
def test_images_are_drawn_once_for_value_and_error_bar(metric, monkeypatch):
    sizes = []

    def counted(reference, samples, images):
        sizes.append(images)
        return drawn(reference, samples, images)

    monkeypatch.setattr("evalkit.metrics.prdc.drawn", counted)
    r, s, t = (batch(pool=rows(60, seed)) for seed in range(3))
    few = replace(metric, images=50)
    few(r, s, CPU)
    influence_of(few, r, s, CPU)
    assert sizes == [50]
    # For other samples, or another number, a new selection is made.
    few(r, t, CPU)
    replace(metric, images=40)(r, t, CPU)
    assert sizes == [50, 50, 40]


def test_copies_are_drawn_one_by_one():
    """With one lot for all, every ball would have another copy in it, and radius 0."""
    copies = np.repeat(rows(100, 5), 8, axis=0)
    chosen, _ = drawn(copies, copies, 160)
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(counts) > 60
    assert counts.max() < 7
    again, _ = drawn(copies[::-1], copies, 160)
    assert sorted(row.tobytes() for row in again) == sorted(row.tobytes() for row in chosen)


def test_which_are_drawn_is_fixed():
    """By BLAKE2 of float32 rows, on every machine; published scores depend on it."""
    line = np.arange(9, dtype=np.float32)[:, None]
    lots = [hashlib.blake2b(struct.pack("<f", value), digest_size=8).digest() for value in range(9)]
    expected = sorted(sorted(range(9), key=lots.__getitem__)[:4])
    np.testing.assert_array_equal(drawn(line, line, 4)[0][:, 0], expected)
    assert expected != [0, 1, 2, 3]


def test_density_and_coverage_of_all_are_the_usual_ones():
    r, s = batch(pool=rows(40, 0)), batch(pool=rows(40, 1))
    usual, found = (metric(r, s, CPU) for metric in (DensityCoverage(), DrawnDensityCoverage()))
    assert [score.value for score in found] == [score.value for score in usual]
    assert found[0].parameters == usual[0].parameters | {"images": 10_000}


def test_bad_parameters_and_few_images_are_refused():
    r = batch(pool=rows(5, 0))
    with pytest.raises(UndefinedMetricError, match="precision and recall with k = 5"):
        StrictPrecisionRecall()(r, r, CPU)
    with pytest.raises(InputError, match="k is 0"):
        StrictPrecisionRecall(k=0)(r, r, CPU)
    with pytest.raises(InputError, match="0 images of each side"):
        DrawnDensityCoverage(images=0)(r, r, CPU)
