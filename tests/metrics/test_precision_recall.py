"""Precision and recall against their definition, scikit-learn and TensorFlow."""

from functools import reduce

import numpy as np
import pytest
import torch
from clouds import CLOUDS, N, exact_distances
from optional import optional
from stand_ins import NO_STORE, batch

from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.metrics.float16 import Float16, float16_norms
from evalkit.metrics.points import Exact, decide
from evalkit.metrics.precision_recall import PrecisionRecall, precision_recall
from evalkit.metrics.screening import Screen, Screening
from evalkit.metrics.search import Covering, Neighbours, slices, smallest
from evalkit.system.run import Run


def float16_distances(u, v):
    """The reference evaluator's arithmetic, from its definition: every result rounded to float16."""
    half = np.float16
    with np.errstate(over="ignore", invalid="ignore"):
        u, v = u.astype(half), v.astype(half)
        norms = [float16_norms(torch.from_numpy(x)).numpy() for x in (u, v)]
        product = (u.astype(np.float64) @ v.astype(np.float64).T).astype(half)
        return np.maximum(norms[0][:, None] - half(2) * product + norms[1], half(0))


DISTANCES = {"exact": exact_distances, "float16": float16_distances}


def every_pair(r, s, k, arithmetic):
    """Precision and recall by their definition."""
    distances = DISTANCES[arithmetic]
    radii_r, radii_s = (np.partition(distances(x, x), k, axis=1)[:, k] for x in (r, s))
    cross = distances(r, s)
    return (cross <= radii_r[:, None]).any(axis=0).mean(), (cross <= radii_s).any(axis=1).mean()


OVERFLOWING = {
    "common offset",
    "one side far away",
    "outlier",
    "float16 overflow",
    "float32 squares overflow",
}
SHARED = ("decaying spectrum", "lattice, full of ties", "near duplicates")


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", CLOUDS)
def test_exact_equals_every_pair(name, k):
    r, s = CLOUDS[name]
    assert precision_recall(r, s, k=k) == every_pair(r, s, k, "exact")


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", [name for name in CLOUDS if name not in OVERFLOWING])
def test_float16_equals_every_pair(name, k):
    r, s = CLOUDS[name]
    assert precision_recall(r, s, k=k, arithmetic="float16") == every_pair(r, s, k, "float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arithmetic", DISTANCES)
def test_the_screens_dtype_does_not_matter(monkeypatch, dtype, arithmetic):
    monkeypatch.setattr("evalkit.metrics.screening.fast_dtype", lambda device: dtype)
    for name in ("decaying spectrum", "non-negative, as pool features are"):
        r, s = CLOUDS[name]
        assert precision_recall(r, s, arithmetic=arithmetic) == every_pair(r, s, 3, arithmetic)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that the clouds have many, ragged ones too."""
    monkeypatch.setattr("evalkit.metrics.screening.CPU_TILE", (64, 160))


@pytest.mark.parametrize("arithmetic", DISTANCES)
@pytest.mark.parametrize("name", [name for name in CLOUDS if name not in OVERFLOWING])
def test_tiles_do_not_matter(small_tiles, name, arithmetic):
    r, s = CLOUDS[name]
    assert precision_recall(r, s, arithmetic=arithmetic) == every_pair(r, s, 3, arithmetic)


@pytest.mark.parametrize("arithmetic", DISTANCES)
def test_block_sizes_do_not_matter(monkeypatch, arithmetic):
    r, s = CLOUDS["decaying spectrum"]
    expected = precision_recall(r, s, arithmetic=arithmetic)
    monkeypatch.setattr("evalkit.metrics.points.BLOCK_ENTRIES", 77 * N)
    monkeypatch.setattr("evalkit.metrics.points.CPU_ENTRIES", 3 * 320)
    assert precision_recall(r, s, arithmetic=arithmetic) == expected


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", [Exact, Float16])
@pytest.mark.parametrize("name", SHARED)
def test_the_order_of_stripes_does_not_matter(small_tiles, name, kind, together):
    """Backwards: also where each stripe knows nothing of what the others found."""
    k = 3
    r, s = (kind(torch.from_numpy(side)) for side in CLOUDS[name])

    def look(points, make):
        finds = make()
        found = []
        for rows in [*slices(0, len(points.x), Screening(r).tile[0])][::-1]:
            found.append(finds.look(rows))
            finds = finds if together else make()
        assert len(found) > 1
        return found

    def radii(points):
        return reduce(smallest, look(points, lambda: Neighbours(points, k, Screening(r))))[:, k]

    sides = r, radii(r), s, radii(s)
    inside = reduce(torch.logical_or, look(r, lambda: Covering(*sides, Screening(r))))
    samples, reference = inside.split([len(s.x), len(r.x)])
    arithmetic = {Exact: "exact", Float16: "float16"}[kind]
    expected = every_pair(*CLOUDS[name], k, arithmetic)
    assert (float(samples.double().mean()), float(reference.double().mean())) == expected


@pytest.mark.parametrize("name", ["decaying spectrum", "isotropic", "small common offset"])
def test_screens_bound_every_distance(name):
    """No screen may see a pair farther apart than its decided distance allows."""
    n = 300
    r, s = (torch.from_numpy(side[:n]) for side in CLOUDS[name])
    everything = slice(0, n)
    for kind in (Exact, Float16):
        a, b = kind(r), kind(s)
        i, j = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, (n, n)), indexing="ij"))
        decided = decide(a, i, b, j).view(n, n)
        dtypes = torch.bfloat16, torch.float32, torch.float64
        screening = Screening(a, [Screen(r.mean(dim=0), dtype) for dtype in dtypes])
        for _ in dtypes:
            seen = screening.seen(a, everything, b, everything)
            # The limits of the rows, for each column's distances in turn; and likewise of the columns.
            for t, of, to, matrix in ((decided, a, b, seen), (decided.T, b, a, seen.T)):
                limits = [screening.limits(column, of, everything, to) for column in t.T]
                assert (matrix <= torch.stack(limits, dim=1)).all()
            below = torch.stack([screening.limits(column * 0.9, a, everything, b) for column in decided.T], 1)
            assert (seen > below).float().mean() > 0.9  # and most are seen about as far as they are
            screening.refine()


def test_scores_agree_with_scikit_learns_neighbours():
    sklearn = optional("sklearn.neighbors", "demo")
    r, s = CLOUDS["decaying spectrum"]
    expected = []
    for centres, points in ((r, s), (s, r)):
        index = sklearn.NearestNeighbors(algorithm="brute").fit(centres.astype(np.float64))
        radii = index.kneighbors(n_neighbors=3)[0][:, 2]
        found = index.kneighbors(points.astype(np.float64), n_neighbors=len(centres))
        expected.append((found[0] <= radii[found[1]]).any(axis=1).mean())
    assert precision_recall(r, s) == tuple(expected)


def tensorflow_distances(u, v):
    tf = optional("tensorflow", "tensorflow")
    u, v = (tf.cast(x, tf.float16) for x in (u, v))
    u_norms = tf.reshape(tf.reduce_sum(tf.square(u), axis=1), [-1, 1])
    v_norms = tf.reshape(tf.reduce_sum(tf.square(v), axis=1), [1, -1])
    return tf.maximum(u_norms - 2 * tf.matmul(u, v, transpose_b=True) + v_norms, 0.0).numpy()


@pytest.mark.parametrize("d", [64, 512, 1600, 2048])
def test_float16_norms_equal_tensorflows(d):
    tf = optional("tensorflow", "tensorflow")
    x = np.abs(np.random.default_rng(d).normal(size=(300, d)) * 0.4).astype(np.float16)
    expected = tf.reduce_sum(tf.square(tf.constant(x)), axis=1).numpy()
    np.testing.assert_array_equal(float16_norms(torch.from_numpy(x)).numpy(), expected)


def test_float16_distances_equal_tensorflows():
    rng = np.random.default_rng(0)
    u, v = (np.abs(rng.normal(size=(n, 2048)) * 0.4).astype(np.float32) for n in (200, 150))
    ours, theirs = float16_distances(u, v), tensorflow_distances(u, v)
    # TensorFlow accumulates the product in float32, so that one in thousands rounds the other way.
    assert (ours == theirs).mean() > 0.998
    np.testing.assert_allclose(ours.astype(np.float64), theirs.astype(np.float64), atol=0.5)


def test_an_overflow_sends_its_block_to_float32(monkeypatch):
    monkeypatch.setattr("evalkit.metrics.float16.REFERENCE_BLOCK", 64)
    rng = np.random.default_rng(0)
    r, s = (rng.normal(size=(n, 32)).astype(np.float32) for n in (128, 64))
    r[100] *= 200  # overflows float16 in the second block of rows only

    def distances(u, v):
        result = np.zeros((len(u), len(v)), np.float32)
        for i in range(0, len(u), 64):
            for j in range(0, len(v), 64):
                block = slice(i, i + 64), slice(j, j + 64)
                result[block] = float16_distances(u[block[0]], v[block[1]])
                if not np.isfinite(result[block]).all():
                    result[block] = exact_distances(u[block[0]], v[block[1]])
        return result

    radii_r, radii_s = (np.partition(distances(x, x), 3, axis=1)[:, 3] for x in (r, s))
    cross = distances(r, s)
    expected = (cross <= radii_r[:, None]).any(axis=0).mean(), (cross <= radii_s).any(axis=1).mean()
    assert precision_recall(r, s, arithmetic="float16") == expected


@pytest.mark.parametrize("arithmetic", DISTANCES)
def test_progress_counts_every_row_once(arithmetic):
    r, s = CLOUDS["decaying spectrum"]
    seen = []
    precision_recall(r, s, arithmetic=arithmetic, progress=lambda done, total: seen.append((done, total)))
    total = 2 * len(r) + len(s)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_global_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert precision_recall(*CLOUDS["common offset"]) == every_pair(*CLOUDS["common offset"], 3, "exact")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_bad_input_is_refused():
    x = CLOUDS["few dimensions"][0]
    with pytest.raises(UndefinedMetricError, match=r"3 images \(samples\)"):
        precision_recall(x, x[:3])
    with pytest.raises(FeatureError, match="3 and of 2"):
        precision_recall(x, x[:, :2])
    with pytest.raises(InputError, match="k is 0"):
        precision_recall(x, x, k=0)
    with pytest.raises(FeatureError, match="reference: the features of image 0"):
        precision_recall(x * np.float32(np.nan), x)


def test_metric_yields_both_scores():
    r, s = CLOUDS["decaying spectrum"]
    sides = batch(pool=r), batch(pool=s)
    metric = PrecisionRecall(arithmetic="float16")
    scores = metric(*sides, Run(device="cpu"))
    assert tuple(score.name for score in scores) == tuple(spec.name for spec in metric.scores)
    assert tuple(score.value for score in scores) == precision_recall(r, s, arithmetic="float16")
    assert scores[0].parameters == {"output": "inception:pool", "k": 3, "arithmetic": "float16"}
    with pytest.raises(UndefinedMetricError, match="give the images"):
        metric(batch(), sides[1], NO_STORE)
