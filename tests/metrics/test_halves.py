"""Precision and recall of halves: against those of the halves themselves, and against replicated draws."""

import numpy as np
import pytest
from halved import check_halves, in_second
from stand_ins import batch

from evalkit.errors import UndefinedMetricError
from evalkit.metrics import halves
from evalkit.metrics.halves import REPLICATES, halves_of_precision_recall
from evalkit.metrics.precision_recall import PrecisionRecall, precision_recall
from evalkit.system.run import Run


def rows(n, seed, d=6, scale=1.0, offset=0.0):
    return (scale * np.random.default_rng(seed).normal(size=(n, d)) + offset).astype(np.float32)


def check_replicates(r, s, found, replicates, k=3, share=1.0):
    check_halves(found, lambda r, s: precision_recall(r, s, k=k), r, s, replicates, share)


@pytest.mark.parametrize(("n", "m", "k"), [(301, 240, 3), (120, 121, 1), (90, 200, 5)])
def test_they_are_the_scores_of_the_halves(n, m, k):
    r, s = rows(n, 0), rows(m, 1, scale=1.2, offset=0.3)
    found = halves_of_precision_recall(r, s, k=k)
    check_replicates(r, s, found, (0, 7, 100, 511), k)
    for each in found:
        assert 0 < each.stderr < 0.1
        assert max(each.stderr_sampling, each.stderr_reference) < each.stderr * 1.2


def test_lists_that_are_too_short_are_doubled(monkeypatch):
    r, s = rows(100, 0), rows(110, 1, offset=0.3)
    expected = halves_of_precision_recall(r, s)
    lengths = []
    nearest = halves._nearest
    monkeypatch.setattr(halves, "_TOO_SHORT", 0.9)
    monkeypatch.setattr(halves, "_nearest", lambda x, count: lengths.append(count) or nearest(x, count))
    found = halves_of_precision_recall(r, s)
    assert lengths[0] == 3
    assert len(lengths) > 2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.both, b.both)


def test_blocks_do_not_matter(monkeypatch):
    r, s = rows(100, 0), rows(110, 1, offset=0.3)
    expected = halves_of_precision_recall(r, s)
    monkeypatch.setattr(halves, "_ROWS", 17)
    monkeypatch.setattr(halves, "_PAIRS", 13)
    found = halves_of_precision_recall(r, s)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.both, b.both, atol=1e-12)


def test_copies_and_ties_are_counted_as_the_metric_does():
    """Points of a small grid: many distances are equal, and many are zero."""
    rng = np.random.default_rng(0)
    r, s = (rng.integers(0, 4, (size, 2)).astype(np.float32) for size in (80, 90))
    # Exact in float32: the mean of all corners is subtracted.
    r[:4] = [[0, 0], [0, 3], [3, 0], [3, 3]]
    r[4:] = np.concatenate([r[4:42], 3 - r[4:42]])
    check_replicates(r, s, halves_of_precision_recall(r, s), range(20))


def test_extreme_features_neither_overflow_nor_vanish():
    r, s = rows(80, 0), rows(80, 1)
    expected = halves_of_precision_recall(r, s)[0].stderr
    for scale in (2.0**120, 2.0**-115):
        found = halves_of_precision_recall(r * np.float32(scale), s * np.float32(scale))[0].stderr
        assert found == pytest.approx(expected, rel=1e-6)


def test_errors_are_those_of_new_draws():
    """Of both scores: of new samples and reference, of new samples alone, of a new reference alone."""
    rng = np.random.default_rng(0)
    centres = 1.5 * rng.normal(size=(5, 8))

    def draw(modes, offset):
        found = rng.normal(size=(300, 8)) + centres[rng.integers(0, modes, 300)] + offset
        return found.astype(np.float32)

    def sides():
        return draw(5, 0.0), draw(4, 0.1)

    truth = np.std([precision_recall(*sides()) for _ in range(200)], axis=0)
    given_reference, given_samples = [], []
    for _ in range(20):  # the errors given the other side are of any such side, so a mean over some
        r, s = sides()
        given_reference.append(np.var([precision_recall(r, draw(4, 0.1)) for _ in range(8)], axis=0, ddof=1))
        given_samples.append(np.var([precision_recall(draw(5, 0.0), s) for _ in range(8)], axis=0, ddof=1))
    found = [halves_of_precision_recall(*sides()) for _ in range(15)]

    def mean(name):
        return np.sqrt(np.mean([[getattr(each, name) ** 2 for each in pair] for pair in found], axis=0))

    for name, expected in (
        ("stderr", truth),
        ("stderr_sampling", np.sqrt(np.mean(given_reference, axis=0))),
        ("stderr_reference", np.sqrt(np.mean(given_samples, axis=0))),
    ):
        ratio = mean(name) / expected
        assert (ratio > 0.8).all(), name
        assert (ratio < 1.2).all(), name


def test_pairs_have_the_error_of_their_difference():
    """Samples that differ little, index by index, against one reference."""
    rng = np.random.default_rng(1)

    def draw():
        noise, other = rng.normal(size=(2, 250, 6))
        a, b = noise, 0.95 * noise + np.sqrt(1 - 0.95**2) * other
        return [(1.1 * each + 0.3).astype(np.float32) for each in (a, b)]

    differences, of_pairs, apart = [], [], []
    for index in range(150):
        r = rows(250, 1000 + index)
        a, b = draw()
        differences.append(np.subtract(precision_recall(r, a), precision_recall(r, b)))
        if index < 25:
            pairs = zip(halves_of_precision_recall(r, a), halves_of_precision_recall(r, b), strict=True)
            pairs = list(pairs)
            of_pairs.append([x.variance_of_difference(y, paired=True) for x, y in pairs])
            apart.append([x.stderr_sampling**2 + y.stderr_sampling**2 for x, y in pairs])
    truth = np.std(differences, axis=0)
    ratio = np.sqrt(np.mean(of_pairs, axis=0)) / truth
    assert (ratio > 0.75).all()
    assert (ratio < 1.25).all()
    assert (np.sqrt(np.mean(apart, axis=0)) > 1.25 * truth).all()


def test_classes_are_halved_each_by_itself():
    classes = np.tile(np.arange(7), 30)
    drawn, second = in_second(210, 1, classes=classes)
    assert drawn.tolist() == list(range(210))
    assert not second.all(axis=1).any()
    assert second.sum(axis=0).tolist() == [105] * REPLICATES
    for each in range(7):
        assert second[classes == each].sum(axis=0).tolist() == [15] * REPLICATES
    # Replicates differ, and every image is in the second half about half of the time.
    assert len(np.unique(second, axis=1).T) == REPLICATES
    assert 0.35 < second.mean(axis=1).min() < second.mean(axis=1).max() < 0.65


def test_of_large_sides_some_images_are_halved(monkeypatch):
    r, s = rows(400, 0), rows(200, 1, offset=0.3)
    monkeypatch.setattr(halves, "MOST_IMAGES", 200)
    found = halves_of_precision_recall(r, s)
    check_replicates(r, s, found, (0, 5), share=0.5)
    assert len(in_second(400, 1, 0.5)[0]) == 200
    assert len(in_second(200, 2, 0.5)[0]) == 100
    monkeypatch.undo()
    whole = halves_of_precision_recall(r, s)
    for part, all_ in zip(found, whole, strict=True):
        assert part.images == 200
        assert part.stderr == pytest.approx(all_.stderr, rel=0.35)


def test_the_metric_is_the_function_and_refuses_too_few():
    r, s = rows(60, 0), rows(70, 1)
    run = Run(device="cpu")
    found = PrecisionRecall(k=2).influence(batch(pool=r), batch(pool=s), run)
    for each, expected in zip(found.values(), halves_of_precision_recall(r, s, k=2), strict=True):
        np.testing.assert_array_equal(each.both, expected.both)
    assert list(found) == ["precision", "recall"]
    with pytest.raises(UndefinedMetricError, match=r"halves of 7 images \(samples\)"):
        PrecisionRecall().influence(batch(pool=r), batch(pool=s[:7]), run)
    assert PrecisionRecall().influence(batch(pool=r), batch(pool=s[:8]), run)["recall"].stderr >= 0
