"""Density and coverage against their definition, those of halves themselves, and replicated draws."""

import numpy as np
import pytest
import torch
from clouds import CLOUDS, exact_distances
from halved import check_halves
from stand_ins import batch

from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.metrics import halves
from evalkit.metrics.density_coverage import DensityCoverage, density_coverage
from evalkit.metrics.halves import halves_of_density_coverage
from evalkit.system.run import Run


def rows(n, seed, d=6, scale=1.0, offset=0.0):
    return (scale * np.random.default_rng(seed).normal(size=(n, d)) + offset).astype(np.float32)


def by_definition(r, s, k):
    """Sums over all pairs of a sample and a ball, as in the paper."""
    within = np.sort(exact_distances(r, r), axis=1)  # column 0 is the image itself
    balls = exact_distances(r, s) < within[:, [k]]
    return balls.sum() / (k * len(s)), balls.any(axis=1).mean()


@pytest.mark.parametrize("name", [name for name in CLOUDS if name != "fewer than 16 points"])
def test_it_is_the_definition(name):
    r, s = CLOUDS[name]
    for k in (1, 5) if "lattice" in name else (5,):
        assert density_coverage(r, s, k=k) == by_definition(r, s, k)


@pytest.mark.parametrize("name", ["decaying spectrum", "lattice, full of ties"])
def test_tiles_and_blocks_do_not_matter(name, monkeypatch):
    monkeypatch.setattr("evalkit.metrics.screening.CPU_TILE", (64, 160))
    monkeypatch.setattr("evalkit.metrics.points.CPU_ENTRIES", 3 * 320)
    r, s = CLOUDS[name]
    assert density_coverage(r, s) == by_definition(r, s, 5)
    monkeypatch.setattr("evalkit.metrics.screening.fast_dtype", lambda device: torch.bfloat16)
    assert density_coverage(r, s) == by_definition(r, s, 5)


def test_of_the_reference_itself_density_and_coverage_are_one():
    """Each ball has its centre and the k - 1 nearer neighbours strictly inside."""
    r = rows(90, 0)
    assert density_coverage(r, r, k=4) == (1.0, 1.0)
    assert density_coverage(r, r + 100, k=4) == (0.0, 0.0)


@pytest.mark.parametrize(("n", "m", "k"), [(301, 240, 5), (120, 121, 1), (90, 200, 3)])
def test_they_are_the_scores_of_the_halves(n, m, k):
    # Halves are compared in float32, so no two distances may be as near as its rounding.
    check_replicates(rows(n, 2), rows(m, 3, scale=1.2, offset=0.3), k, (0, 7, 511))


def test_of_large_sides_some_images_are_halved_and_blocks_do_not_matter(monkeypatch):
    monkeypatch.setattr(halves, "MOST_IMAGES", 150)
    monkeypatch.setattr(halves, "_ROWS", 17)
    monkeypatch.setattr(halves, "_PAIRS", 13)
    check_replicates(rows(300, 0), rows(200, 1, offset=0.3), 3, (0, 100), share=0.5)


def test_ties_are_counted_as_the_metric_does():
    """Points of a small grid: many distances are equal, and many are zero."""
    rng = np.random.default_rng(0)
    r, s = (rng.integers(0, 4, (size, 2)).astype(np.float32) for size in (80, 90))
    # Exact in float32: the mean of all corners is subtracted.
    r[:4] = [[0, 0], [0, 3], [3, 0], [3, 3]]
    r[4:] = np.concatenate([r[4:42], 3 - r[4:42]])
    check_replicates(r, s, 3, range(20))


def check_replicates(r, s, k, replicates, share=1.0):
    found = halves_of_density_coverage(r, s, k=k)
    check_halves(found, lambda r, s: by_definition(r, s, k), r, s, replicates, share)


def test_errors_are_those_of_new_draws():
    """Of both scores: of new samples and reference, and of new samples alone."""
    rng = np.random.default_rng(0)
    centres = 1.5 * rng.normal(size=(5, 8))

    def draw(modes, offset):
        found = rng.normal(size=(300, 8)) + centres[rng.integers(0, modes, 300)] + offset
        return found.astype(np.float32)

    def sides():
        return draw(5, 0.0), draw(4, 0.1)

    truth = np.std([density_coverage(*sides()) for _ in range(200)], axis=0)
    given_reference = []
    for _ in range(20):  # the error given the reference is of any such, so a mean over some
        r = sides()[0]
        given_reference.append(np.var([density_coverage(r, draw(4, 0.1)) for _ in range(8)], axis=0, ddof=1))
    found = [halves_of_density_coverage(*sides()) for _ in range(15)]

    def mean(name):
        return np.sqrt(np.mean([[getattr(each, name) ** 2 for each in pair] for pair in found], axis=0))

    for name, expected in (
        ("stderr", truth),
        ("stderr_sampling", np.sqrt(np.mean(given_reference, axis=0))),
    ):
        ratio = mean(name) / expected
        assert (ratio > 0.8).all(), (name, ratio)
        assert (ratio < 1.2).all(), (name, ratio)


def test_bad_input_is_refused():
    with pytest.raises(UndefinedMetricError, match=r"with k = 5 of 5 images \(reference\)"):
        density_coverage(rows(5, 0), rows(9, 1))
    with pytest.raises(FeatureError, match="6 and of 4"):
        density_coverage(rows(9, 0), rows(9, 1, d=4))
    with pytest.raises(InputError, match="k is 0"):
        density_coverage(rows(9, 0), rows(9, 1), k=0)


def test_the_metric_is_the_function():
    r, s = rows(60, 0), rows(70, 1)
    seen = []
    run = Run(device="cpu", progress=lambda *what: seen.append(what))
    density, coverage = DensityCoverage(k=2)(batch(pool=r), batch(pool=s), run)
    assert (density.value, coverage.value) == density_coverage(r, s, k=2)
    assert (density.name, coverage.name) == ("density", "coverage")
    assert density.parameters == {"output": "inception:pool", "k": 2}
    assert seen[-1] == ("density and coverage", 120, 120)
    found = DensityCoverage(k=2).influence(batch(pool=r), batch(pool=s), run)
    for each, expected in zip(found.values(), halves_of_density_coverage(r, s, k=2), strict=True):
        np.testing.assert_array_equal(each.both, expected.both)
    with pytest.raises(UndefinedMetricError, match=r"halves of 9 images \(samples\)"):
        DensityCoverage(k=4).influence(batch(pool=r), batch(pool=s[:9]), run)
