"""AuthPct against its definition, that of halves themselves, and replicated draws."""

import numpy as np
import pytest
import torch
from clouds import CLOUDS, exact_distances
from halved import check_halves
from stand_ins import batch

from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.metrics import halves
from evalkit.metrics.authenticity import AuthPct, authenticity
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
