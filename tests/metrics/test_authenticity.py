"""AuthPct against its definition, that of halves themselves, and replicated draws."""

import numpy as np
import pytest
import torch
from clouds import CLOUDS, exact_distances
from halved import check_halves
from stand_ins import batch

from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.metrics import halves
from evalkit.metrics.authenticity import AuthPct, authenticity, closest_pairs
from evalkit.metrics.halves import halves_of_authenticity
from evalkit.system.run import Run


def rows(n, seed, d=6, scale=1.0, offset=0.0):
    return (scale * np.random.default_rng(seed).normal(size=(n, d)) + offset).astype(np.float32)


def by_definition(r, s):
    """Over all pairs."""
    within = exact_distances(r, r)
    np.fill_diagonal(within, np.inf)
    across = exact_distances(s, r)
    nearest = across.argmin(axis=1)
    authentic = within.min(axis=1)[nearest] < across[np.arange(len(s)), nearest]
    return 100 * int(authentic.sum()) / len(s)


@pytest.mark.parametrize("name", CLOUDS)
def test_it_is_the_definition(name):
    r, s = CLOUDS[name]
    assert authenticity(r, s) == by_definition(r, s)


@pytest.mark.parametrize("name", ["decaying spectrum", "lattice, full of ties"])
def test_tiles_and_the_screens_dtype_do_not_matter(name, monkeypatch):
    monkeypatch.setattr("evalkit.metrics.screening.CPU_TILE", (64, 160))
    r, s = CLOUDS[name]
    assert authenticity(r, s) == by_definition(r, s)
    monkeypatch.setattr("evalkit.metrics.screening.fast_dtype", lambda device: torch.bfloat16)
    assert authenticity(r, s) == by_definition(r, s)


def closest_by_definition(r, s, count):
    """(sample, reference, distance, to_another), over all pairs."""
    within = exact_distances(r, r)
    np.fill_diagonal(within, np.inf)
    across = exact_distances(s, r)
    nearest = across.argmin(axis=1)
    distances = across[np.arange(len(s)), nearest]
    order = np.argsort(distances, kind="stable")[:count]
    return [(i, nearest[i], distances[i] ** 0.5, within[nearest[i]].min() ** 0.5) for i in order]


@pytest.mark.parametrize(("name", "count"), [*((name, 12) for name in CLOUDS), ("decaying spectrum", 10_000)])
def test_the_closest_pairs_are_those_of_all_pairs(name, count, monkeypatch):
    monkeypatch.setattr("evalkit.metrics.screening.CPU_TILE", (64, 160))
    monkeypatch.setattr("evalkit.metrics.screening.fast_dtype", lambda device: torch.bfloat16)
    r, s = CLOUDS[name]
    found = closest_pairs(r, s, count)
    expected = closest_by_definition(r, s, count)
    assert len(found) == min(count, len(s))
    assert [(pair.sample, pair.reference) for pair in found] == [(i, j) for i, j, _, _ in expected]
    for pair, (_, _, distance, to_another) in zip(found, expected, strict=True):
        assert pair.distance == pytest.approx(distance, rel=1e-12, abs=0)
        assert pair.to_another == pytest.approx(to_another, rel=1e-12, abs=0)


def test_an_image_is_not_its_own_neighbour_in_any_tile(monkeypatch):
    """Also where it is alone in the last tile; and twice the same image are neighbours at distance 0."""
    monkeypatch.setattr("evalkit.metrics.screening.CPU_TILE", (64, 160))
    r = rows(161, 0)
    s = r[[160, 0, 159]] + np.float32(1e-3)
    expected = closest_by_definition(r, s, 3)
    found = closest_pairs(r, s, 3)
    assert [pair.to_another for pair in found] == pytest.approx([each[3] for each in expected], rel=1e-12)
    assert all(pair.ratio == pair.distance / pair.to_another < 0.1 for pair in found)
    r[3] = r[160]
    twice = closest_pairs(r, r[[160, 7]], 2)
    assert [(pair.sample, pair.reference) for pair in twice] == [(0, 3), (1, 7)]
    assert (twice[0].to_another, twice[0].ratio, twice[1].ratio) == (0, None, 0)


def test_closest_pairs_of_tiny_features_are_in_their_units():
    r, s = rows(50, 0), rows(20, 1)
    plain, tiny = closest_pairs(r, s, 5), closest_pairs(r * np.float32(2**-30), s * np.float32(2**-30), 5)
    assert [pair.distance for pair in tiny] == [pair.distance * 2**-30 for pair in plain]
    assert [pair.ratio for pair in tiny] == [pair.ratio for pair in plain]


def test_closest_pairs_of_a_single_image_are_refused():
    with pytest.raises(UndefinedMetricError, match=r"1 image \(reference\) is undefined; give at least 2"):
        closest_pairs(rows(1, 0), rows(5, 1), 3)


def test_copies_are_found():
    r, s = rows(200, 0), rows(100, 1)
    before = authenticity(r, s)
    assert 30 < before < 70
    s[:50] = r[:50] + 1e-3
    assert authenticity(r, s) == pytest.approx(100 * np.mean([0] * 50 + [before / 100] * 50), abs=8)
    assert authenticity(r, r) == 0
    assert authenticity(r, s + 100) == 100


@pytest.mark.parametrize(("n", "m"), [(201, 140), (90, 160)])
def test_they_are_the_scores_of_the_halves(n, m, monkeypatch):
    # Halves are compared in float32, so no two distances may be as near as its rounding.
    r, s = rows(n, 2), rows(m, 3, scale=1.2, offset=0.3)
    check_halves([halves_of_authenticity(r, s)], lambda r, s: [by_definition(r, s)], r, s, (0, 7, 511))
    monkeypatch.setattr(halves, "MOST_IMAGES", 100)
    monkeypatch.setattr(halves, "_ROWS", 17)
    share = 100 / max(n, m)
    check_halves([halves_of_authenticity(r, s)], lambda r, s: [by_definition(r, s)], r, s, (0, 100), share)


def test_errors_are_those_of_new_draws():
    """Of new samples and training images, and of new samples alone."""
    rng = np.random.default_rng(0)

    def draw(offset):
        return (rng.normal(size=(250, 6)) + offset).astype(np.float32)

    truth = np.std([authenticity(draw(0), draw(0.3)) for _ in range(250)])
    given_reference = []
    for _ in range(25):  # the error given the reference is of any such, so a mean over some
        r = draw(0)
        given_reference.append(np.var([authenticity(r, draw(0.3)) for _ in range(10)], ddof=1))
    found = [halves_of_authenticity(draw(0), draw(0.3)) for _ in range(15)]
    for name, expected in (("stderr", truth), ("stderr_sampling", np.sqrt(np.mean(given_reference)))):
        ratio = np.sqrt(np.mean([getattr(each, name) ** 2 for each in found])) / expected
        assert 0.8 < ratio < 1.2, (name, ratio)


def test_bad_input_is_refused():
    with pytest.raises(UndefinedMetricError, match=r"AuthPct of 1 image \(reference\) is undefined"):
        authenticity(rows(1, 0), rows(9, 1))
    with pytest.raises(FeatureError, match="6 and of 4"):
        authenticity(rows(9, 0), rows(9, 1, d=4))


def test_the_metric_is_the_function():
    r, s = rows(60, 0), rows(70, 1)
    seen = []
    run = Run(device="cpu", progress=lambda *what: seen.append(what))
    (score,) = AuthPct()(batch(pool=r), batch(pool=s), run)
    assert (score.name, score.value) == ("authpct", authenticity(r, s))
    assert score.parameters == {"output": "inception:pool"}
    assert seen[-1] == ("authpct", 130, 130)
    found = AuthPct().influence(batch(pool=r), batch(pool=s), run)["authpct"]
    np.testing.assert_array_equal(found.both, halves_of_authenticity(r, s).both)
