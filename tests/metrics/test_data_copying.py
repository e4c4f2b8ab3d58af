"""C_T against its definition with scikit-learn and SciPy, and on samples that are copies in part."""

import numpy as np
import pytest
from optional import optional
from scipy import stats
from stand_ins import batch

from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.metrics.data_copying import DataCopying, data_copying
from evalkit.system.run import Run

CENTRES = 8 * np.random.default_rng(99).normal(size=(3, 5))


def rows(rng, n, shares=(0.5, 0.3, 0.2), scale=1.0):
    """Three clusters that any k-means finds."""
    found = CENTRES[rng.choice(3, n, p=shares)] + scale * rng.normal(size=(n, 5))
    return found.astype(np.float32)


def by_definition(training, held_out, samples):
    cluster, neighbors = (optional(f"sklearn.{name}", "demo") for name in ("cluster", "neighbors"))
    cells = cluster.KMeans(3, n_init=10, random_state=1).fit(training)
    of_training, of_held_out, of_samples = (cells.predict(x) for x in (training, held_out, samples))
    total = weight = 0.0
    for cell in range(3):
        search = neighbors.NearestNeighbors(n_neighbors=1).fit(training[of_training == cell])
        own, others = samples[of_samples == cell], held_out[of_held_out == cell]
        if len(own) <= 20:
            continue
        q, p = (search.kneighbors(x)[0][:, 0] for x in (own, others))
        n, m = len(p), len(q)
        u = stats.mannwhitneyu(q, p, alternative="less", method="asymptotic").statistic
        total += len(p) * (u - (n * m / 2 - 0.5)) / np.sqrt(n * m * (n + m + 1) / 12)
        weight += len(p)
    return total / weight


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.55, 0.43, 0.02)])
def test_it_is_the_definition(shares):
    """Also where a cell has too few samples to count."""
    rng = np.random.default_rng(0)
    training, held_out, samples = rows(rng, 400), rows(rng, 350), rows(rng, 500, shares, 0.9)
    found = data_copying(training, held_out, samples)
    assert found.cells == 3
    assert found.value == pytest.approx(by_definition(training, held_out, samples), rel=1e-9)


def test_it_is_of_principal_components():
    """Features that are the same on all images, and a rotation, change nothing."""
    rng = np.random.default_rng(1)
    sides = [rows(rng, n) for n in (400, 350, 300)]
    turn = np.linalg.qr(rng.normal(size=(9, 9)))[0]
    wide = [(np.pad(x, ((0, 0), (0, 4))) @ turn).astype(np.float32) for x in sides]
    expected = data_copying(*sides).value
    assert data_copying(*wide, components=5).value == pytest.approx(expected, abs=0.02)
    assert data_copying(*wide, components=2).value != pytest.approx(expected, abs=0.02)


def test_without_copies_it_is_standard_normal():
    rng = np.random.default_rng(2)
    found = [data_copying(rows(rng, 150), rows(rng, 120), rows(rng, 150), cells=1).value for _ in range(200)]
    assert abs(np.mean(found)) < 0.35
    assert 0.7 < np.std(found) < 1.4


def test_copies_are_low_and_blurred_ones_high():
    rng = np.random.default_rng(3)
    training, held_out, samples = rows(rng, 400), rows(rng, 400), rows(rng, 400)
    assert abs(data_copying(training, held_out, samples).value) < 3
    copies = training + np.float32(0.05)
    assert data_copying(training, held_out, copies).value < -8
    samples[:100] = copies[:100]
    assert data_copying(training, held_out, samples).value < -3
    assert data_copying(training, held_out, rows(rng, 400, scale=1.8)).value > 3


def test_few_images_and_copies_have_fewer_cells():
    rng = np.random.default_rng(4)
    training, held_out, samples = rows(rng, 250), rows(rng, 400), rows(rng, 400)
    assert data_copying(training, held_out, samples).cells == 2
    assert data_copying(training[:50], held_out, samples).cells == 1
    assert data_copying(np.ones_like(held_out), held_out, samples).cells == 1


def test_bad_input_is_refused():
    rng = np.random.default_rng(5)
    x = rows(rng, 30)
    for wrong in ({"cells": 0}, {"components": 0}):
        with pytest.raises(InputError, match="expected at least 1 of each"):
            data_copying(x, x, x, **wrong)
    with pytest.raises(UndefinedMetricError, match=r"C_T of 1 image \(samples\)"):
        data_copying(x, x, x[:1])
    with pytest.raises(FeatureError, match="5 and of 2"):
        data_copying(x, x[:, :2], x)


def test_the_metric_halves_the_reference_whatever_its_order():
    rng = np.random.default_rng(6)
    reference, samples = rows(rng, 700), rows(rng, 350)
    run = Run(device="cpu")

    def score(reference, samples):
        (found,) = DataCopying()(batch(pool=reference), batch(pool=samples), run)
        return found

    found = score(reference, samples)
    assert found.parameters == {"output": "inception:pool", "cells": 3, "components": 64, "seed": 0}
    assert abs(found.value) < 3
    assert score(reference[::-1].copy(), samples).value == found.value
    assert score(reference, reference[:350] + np.float32(0.02)).value < -3
    assert score(reference[:90], samples[:90]).parameters["cells"] == 1
    with pytest.raises(UndefinedMetricError, match=r"3 images \(reference\) is undefined; give at least 4"):
        score(reference[:3], samples)
    with pytest.raises(UndefinedMetricError, match=r"itself a z-statistic.*standard error is at most 1"):
        DataCopying().influence(batch(pool=reference), batch(pool=samples), run)
