"""Influence values and biases: against derivatives of the weighted scores, and against replicated draws."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.special import log_softmax
from stand_ins import NO_STORE, batch

from evalkit.deviations import balanced_classes
from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.features.moments import Gaussian, Moments
from evalkit.metrics import frechet, frechet_estimate
from evalkit.metrics import frechet_influence as frechet_influence_module
from evalkit.metrics.frechet import FID, frechet_distance
from evalkit.metrics.frechet_influence import Cloud, Transport, frechet_influence
from evalkit.metrics.inception_score import inception_influence, inception_score
from evalkit.metrics.kernel import KernelDistance, kernel_means, polynomial_mmd
from evalkit.system.run import Run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny products: waking threads for each would take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(n, seed, d=7, scale=1.0, offset=0.0):
    """Float64, of a skewed distribution."""
    rng = np.random.default_rng(seed)
    mixed = np.random.default_rng(99).normal(size=(d, d))
    return scale * (rng.normal(size=(n, d)) + 0.3 * rng.normal(size=(n, d)) ** 2) @ mixed + offset


def derivatives(score, n, some=8, step=1e-5):
    """Of ``score(weights)`` along ``delta_i - 1/n``, for the first i, by differences."""
    weights, found = np.full(n, 1 / n), []
    for i in range(some):
        direction = np.eye(n)[i] - 1 / n
        ahead, behind = (score(weights + sign * step * direction) for sign in (1, -1))
        found.append((ahead - behind) / (2 * step))
    return np.array(found)


# Derivatives -----------------------------------------------------------------------------------------------


def weighted_moments(x, w):
    mean = w @ x
    return mean, ((x - mean) * w[:, None]).T @ (x - mean) / (1 - w @ w)


def weighted_frechet(reference, samples, of_reference, of_samples):
    (m, s), (mu, sigma) = (
        weighted_moments(x, w) for x, w in ((reference, of_reference), (samples, of_samples))
    )
    return np.sum((mu - m) ** 2) + np.trace(s + sigma - 2 * linalg.sqrtm(s @ sigma).real)


def test_frechet_influence_is_the_derivative():
    r, x = rows(50, 0), rows(60, 1, scale=1.3, offset=0.2)
    found = frechet_influence(Cloud.of(r), Cloud.of(x))
    even_r, even_x = (np.full(len(each), 1 / len(each)) for each in (r, x))
    assert weighted_frechet(r, x, even_r, even_x) == pytest.approx(frechet_distance(r, x), rel=1e-10)
    expected = derivatives(lambda w: weighted_frechet(r, x, even_r, w), len(x))
    np.testing.assert_allclose(found.samples[:8], expected, rtol=1e-6, atol=1e-5)
    expected = derivatives(lambda w: weighted_frechet(r, x, w, even_x), len(r))
    np.testing.assert_allclose(found.reference[:8], expected, rtol=1e-6, atol=1e-5)


def weighted_inception_score(logits, w, split_size):
    log_p = log_softmax(logits, axis=1)
    scores = []
    for start in range(0, len(logits), split_size):
        part, own = log_p[start : start + split_size], w[start : start + split_size]
        p, own = np.exp(part), own / own.sum()
        scores.append(np.exp(own @ (p * (part - np.log(own @ p))).sum(axis=1)))
    return np.mean(scores)


def test_inception_influence_is_the_derivative():
    logits = 2 * np.random.default_rng(0).normal(size=(70, 9))
    found = inception_influence(logits, 30).samples  # the last split is short
    expected = derivatives(lambda w: weighted_inception_score(logits, w, 30), 70, some=70)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def weighted_kernel_distance(reference, samples, of_reference, of_samples):
    def mean(a, b, v, w, others):
        pairs = np.outer(v, w) * others
        return (pairs * (a @ b.T / a.shape[1] + 1) ** 3).sum() / pairs.sum()

    within = [
        mean(x, x, w, w, 1 - np.eye(len(x))) for x, w in ((reference, of_reference), (samples, of_samples))
    ]
    return sum(within) - 2 * mean(reference, samples, of_reference, of_samples, 1)


def test_kernel_influence_is_the_derivative():
    r, x = rows(40, 0, scale=0.5), rows(30, 1, scale=0.6, offset=0.1)
    means = kernel_means(r, x)
    found = means.influence()
    even_r, even_x = (np.full(len(each), 1 / len(each)) for each in (r, x))
    assert means.value == polynomial_mmd(r, x)
    assert means.value == pytest.approx(weighted_kernel_distance(r, x, even_r, even_x), rel=1e-10)
    expected = derivatives(lambda w: weighted_kernel_distance(r, x, even_r, w), len(x))
    np.testing.assert_allclose(found.samples[:8], expected, rtol=1e-6, atol=1e-5)
    expected = derivatives(lambda w: weighted_kernel_distance(r, x, w, even_x), len(r))
    np.testing.assert_allclose(found.reference[:8], expected, rtol=1e-6, atol=1e-5)


# Identities ------------------------------------------------------------------------------------------------


def test_frechet_formulas_are_those_written_out():
    """Every matrix of the formulas, and a sum over all pairs of features for the bias."""
    r, x = rows(90, 0), rows(80, 1, scale=1.2, offset=0.4)
    n = len(x)
    mu, sigma, m, s_matrix = x.mean(axis=0), np.cov(x.T), r.mean(axis=0), np.cov(r.T)
    lower = linalg.cholesky(s_matrix, lower=True)
    values, v = linalg.eigh(lower.T @ sigma @ lower)
    s, y = np.sqrt(values), (x - mu) @ lower @ v
    fourth = (y**2).T @ y**2 / n - np.diag(values**2)
    psi = 2 * (x - mu) @ (mu - m) + n / (n - 1) * (((x - mu) ** 2).sum(axis=1) - (y**2 / s).sum(axis=1))
    bias = np.trace(sigma) / n + (fourth / (np.outer(s, s) * (s[:, None] + s))).sum() / (2 * n)
    distance = np.sum((mu - m) ** 2) + np.trace(sigma + s_matrix) - 2 * s.sum()

    transport = Transport(Cloud.of(r), Cloud.of(x))
    found, of_samples = transport.of_samples(CPU)
    assert transport.distance == pytest.approx(distance, rel=1e-11)
    assert of_samples == pytest.approx(bias, rel=1e-11)
    np.testing.assert_allclose(found, psi - psi.mean(), rtol=0, atol=1e-11 * np.abs(psi).max())
    # The eigenproblem of one direction serves the other.
    exchanged, of_reference = Transport(Cloud.of(x), Cloud.of(r)).of_reference(CPU)
    assert of_reference == pytest.approx(of_samples, rel=1e-11)
    np.testing.assert_allclose(exchanged, found, rtol=0, atol=1e-11 * np.abs(psi).max())


def test_the_distance_of_equal_batches_has_no_error():
    x = rows(400, 0)
    assert np.abs(frechet_influence(Cloud.of(x), Cloud.of(x)).samples).max() < 1e-9 * np.trace(np.cov(x.T))


def test_float32_features_give_the_same_to_their_precision():
    r, x = rows(500, 0).astype(np.float32), rows(600, 1, scale=1.1).astype(np.float32)
    narrow, wide = (
        frechet_estimate(*(each.astype(dtype) for each in (r, x))) for dtype in (np.float32, np.float64)
    )
    assert narrow.value == pytest.approx(wide.value, rel=1e-9)
    assert narrow.stderr == pytest.approx(wide.stderr, rel=1e-5)
    assert narrow.unbiased == pytest.approx(wide.unbiased, rel=1e-5)


def test_order_and_units_of_features_do_not_matter():
    r, x = rows(100, 0), rows(90, 1, offset=0.5)
    found = frechet_estimate(r, x)
    same = frechet_estimate(r[::-1, ::-1].copy(), x[::-1, ::-1].copy())
    scaled = frechet_estimate(1e-4 * r, 1e-4 * x)
    assert same.stderr == pytest.approx(found.stderr, rel=1e-9)
    assert scaled.stderr == pytest.approx(1e-8 * found.stderr, rel=1e-9)
    assert scaled.unbiased == pytest.approx(1e-8 * found.unbiased, rel=1e-9)


def mixed_derivative(score, n, i, m, j, step=1e-3):
    """Second one of ``score(change of the first weights, of the second)``, for image i and image j."""
    a, b = ((np.eye(size)[k] - 1 / size) * step for size, k in ((n, i), (m, j)))
    return sum(p * q * score(p * a, q * b) for p in (1, -1) for q in (1, -1)) / (4 * step**2)


def test_the_excess_is_of_second_derivatives(monkeypatch):
    """Of two images of each side: among samples, among the reference, and between the sides."""
    r, x = rows(400, 0), rows(500, 1, scale=1.3, offset=0.2)
    m, n = len(r), len(x)
    even_r, even_x = np.full(m, 1 / m), np.full(n, 1 / n)
    pairs = {
        "sampling": [
            mixed_derivative(lambda v, w: weighted_frechet(r, x, even_r, even_x + v + w), n, 0, n, 1)
        ],
        "reference": [
            mixed_derivative(lambda v, w: weighted_frechet(r, x, even_r + v + w, even_x), m, 0, m, 1)
        ],
        "joint": [
            mixed_derivative(lambda v, w: weighted_frechet(r, x, even_r + v, even_x + w), m, i, n, j)
            for i in (0, 1)
            for j in (0, 1)
        ],
    }

    class InOrder:
        permutation = staticmethod(np.arange)

    monkeypatch.setattr(np.random, "default_rng", lambda _: InOrder())
    monkeypatch.setattr(frechet_influence_module, "_PAIRED_ROWS", 2)
    found = Transport(Cloud.of(r), Cloud.of(x)).excess(CPU)
    for name, scale in (("sampling", 2 * n**2), ("reference", 2 * m**2), ("joint", n * m)):
        expected = np.mean(np.square(pairs[name])) / scale
        assert getattr(found, name) == pytest.approx(expected, rel=0.02), name


def test_the_excess_of_the_kernel_is_of_second_derivatives():
    r, x = rows(30, 0, scale=0.5), rows(40, 1, scale=0.6, offset=0.1)

    def centred(kernel, others):
        pairs = np.where(others, kernel, 0)
        by_row, by_column = pairs.sum(axis=1) / others.sum(axis=1), pairs.sum(axis=0) / others.sum(axis=0)
        mean = pairs.sum() / others.sum()
        return np.mean(np.square(kernel - by_row[:, None] - by_column + mean)[others])

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    off = [~np.eye(len(each), dtype=bool) for each in (r, x)]
    expected = (
        2 * centred(kernel(x, x), off[1]) / 40**2,
        2 * centred(kernel(r, r), off[0]) / 30**2,
        4 * centred(kernel(r, x), np.ones((30, 40), bool)) / (30 * 40),
    )
    assert kernel_means(r, x).excess == pytest.approx(expected, rel=0.15)  # equal but for O(1/n)


# Replicated draws ------------------------------------------------------------------------------------------

D = 16
SPREAD = np.arange(1, D + 1) ** -0.6


def draw(rng, n, shift=0.0, kind="normal"):
    made = {
        "normal": lambda: rng.normal(size=(n, D)),
        "relu": lambda: 1.7 * np.maximum(rng.normal(size=(n, D)) + 0.3, 0),
        "mixture": lambda: rng.normal(size=(n, D)) * rng.choice([0.6, 1.3], size=(n, 1)),
    }
    return made[kind]() * SPREAD * (1 + shift) + 0.3 * shift


@functools.cache
def exactly(kind="normal", shift=0.0):
    """Mean and covariance, of very many draws."""
    return Moments.of(draw(np.random.default_rng(12345), 1_000_000, shift, kind)).gaussian()


@pytest.mark.parametrize(
    ("kind", "shift", "low", "high"),
    [
        ("normal", 0.3, 0.9, 1.15),
        ("relu", 0.3, 0.9, 1.15),
        ("mixture", 0.3, 0.9, 1.15),
        ("relu", 0, 0.9, 1.25),
    ],
)
def test_frechet_errors_and_bias_are_those_of_new_draws(kind, shift, low, high):
    """Against a reference of draws; where both are alike, the error is a little wide."""
    rng = np.random.default_rng(7)
    found = [frechet_estimate(draw(rng, 400, 0, kind), draw(rng, 320, shift, kind)) for _ in range(500)]
    truth = frechet_distance(exactly(kind), exactly(kind, shift))
    value, stderr, unbiased = (
        np.array([getattr(each, name) for each in found]) for name in ("value", "stderr", "unbiased")
    )
    assert low < np.sqrt(np.mean(stderr**2)) / value.std() < high
    raw, left = value.mean() - truth, unbiased.mean() - truth
    noise = unbiased.std() / np.sqrt(len(found))
    assert abs(left) < 0.1 * raw + 3 * noise
    assert raw > 10 * noise  # there is a bias to be taken away
    assert unbiased.std() < 1.1 * value.std()
    inside = np.abs(unbiased - truth) < 1.96 * stderr
    assert inside.mean() >= 0.9


def test_sampling_error_is_that_of_new_samples_against_one_reference():
    rng = np.random.default_rng(8)
    reference = draw(rng, 300)
    found = [frechet_estimate(reference, draw(rng, 320, 0.3)) for _ in range(400)]
    spread = np.std([each.value for each in found])
    assert 0.9 < np.sqrt(np.mean([each.stderr_sampling**2 for each in found])) / spread < 1.15


def test_halves_correct_what_the_bias_formula_leaves():
    """With few images for each feature, on both sides."""
    rng = np.random.default_rng(9)
    n, truth = 5 * D // 2, frechet_distance(exactly(), exactly(shift=0.3))
    raw, plain, corrected = [], [], []
    for _ in range(400):
        r, x = Cloud.of(draw(rng, n)), Cloud.of(draw(rng, n, 0.3))
        transport = Transport(r, x)
        raw.append(transport.distance)
        plain.append(raw[-1] - transport.of_samples(CPU)[1] - transport.of_reference(CPU)[1])
        bias = frechet_influence(r, x).bias
        corrected.append(raw[-1] - bias)
    noise = np.std(corrected) / np.sqrt(len(raw))
    left = abs(np.mean(corrected) - truth)
    assert left < 0.05 * (np.mean(raw) - truth) + 3 * noise
    assert np.mean(plain) - truth > 5 * noise  # which is why the halves are there


def test_balanced_labels_count_within_classes_alone():
    """Classes with fixed numbers of images, and means of their own."""
    rng = np.random.default_rng(10)
    means = rng.normal(size=(5, D)) * SPREAD
    labels = np.repeat(np.arange(5), 64)
    reference = batch(gaussians={"pool": exactly()})

    def made(chosen):
        return (draw(rng, len(chosen)) * 0.7 + means[chosen]).astype(np.float32)

    def of(pool, labels):
        found = batch(pool=pool)
        return replace(
            found, networks={key: replace(each, labels=labels) for key, each in found.networks.items()}
        )

    def errors(labels):
        values, found = [], []
        for _ in range(300):
            samples = of(made(labels), labels)
            values.append(FID(reference, samples, NO_STORE)[0].value)
            found.append(FID.influence(reference, samples, NO_STORE)["fid"].stderr_sampling)
        return np.std(values), np.sqrt(np.mean(np.square(found)))

    truth, stderr = errors(labels)
    assert 0.9 < stderr / truth < 1.15
    plain = FID.influence(reference, batch(pool=made(labels)), NO_STORE)["fid"].stderr_sampling
    assert plain > 1.1 * stderr


def test_inception_score_errors_and_bias_are_those_of_new_draws():
    rng = np.random.default_rng(11)
    classes = 40

    def draw_logits(n):
        return 2.5 * rng.normal(size=(n, classes)) + 3 * np.eye(classes)[rng.integers(0, classes, n)]

    truth = inception_score(draw_logits(300_000), 300_000, dtype="float64").mean
    found, values = [], []
    for _ in range(400):
        logits = draw_logits(400)
        values.append(inception_score(logits, 200, dtype="float64").mean)
        found.append(inception_influence(logits, 200))
    unbiased = np.array(values) - [each.bias for each in found]
    noise = np.std(unbiased) / 20
    assert 0.9 < np.sqrt(np.mean([each.stderr**2 for each in found])) / np.std(values) < 1.15
    assert np.mean(values) < truth - 10 * noise
    assert abs(unbiased.mean() - truth) < 0.1 * (truth - np.mean(values)) + 3 * noise


@pytest.mark.parametrize(("shift", "low", "high"), [(0.4, 0.9, 1.15), (0.0, 0.9, 1.25)])
def test_kernel_errors_are_those_of_new_draws(shift, low, high):
    rng = np.random.default_rng(12)
    found = [kernel_means(draw(rng, 150), draw(rng, 200, shift)) for _ in range(400)]
    spread = np.std([each.value for each in found])
    assert low < np.sqrt(np.mean([each.influence().stderr ** 2 for each in found])) / spread < high


# Where there is none ---------------------------------------------------------------------------------------


def test_too_few_images_have_a_value_and_no_error():
    r, x = rows(50, 0), rows(7, 1)
    for found in (frechet_estimate(r, x), frechet_estimate(x, r)):
        assert found.value == pytest.approx(frechet_distance(r, x), rel=1e-9)
        assert (found.stderr, found.stderr_reference, found.unbiased) == (None, None, None)
        assert "7 images of 7 features have a singular covariance" in found.why


def test_few_images_have_an_error_and_no_unbiased_value():
    found = frechet_estimate(rows(100, 0), rows(15, 1))
    assert found.stderr > 0
    assert found.unbiased is None
    assert "15 images of 7 features are too few; give at least 16" in found.why
    assert frechet_estimate(rows(100, 0), rows(16, 1)).unbiased is not None


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("defect", ["constant", "repeated", "sum"])
def test_singular_covariances_have_no_error(side, defect):
    sides = [rows(60, 0), rows(60, 1)]
    sides[side][:, 2] = {
        "constant": 5.0,
        "repeated": sides[side][:, 3],
        "sum": sides[side][:, 3:].sum(axis=1),
    }[defect]
    found = frechet_estimate(*sides)
    assert np.isfinite(found.value)
    assert (found.stderr, found.unbiased) == (None, None)
    assert "singular" in found.why


def test_few_different_images_have_no_error():
    """More images than features, most of them copies."""
    found = frechet_estimate(rows(60, 0), np.tile(rows(5, 1), (20, 1)))
    assert (found.stderr, found.unbiased) == (None, None)


def test_statistics_alone_are_exact_as_reference_and_no_samples():
    r, x = rows(200, 0), rows(150, 1)
    found = frechet_estimate(Moments.of(r).gaussian(), x)
    assert found.value == pytest.approx(frechet_distance(r, x), rel=1e-9)
    assert found.stderr == found.stderr_sampling == pytest.approx(frechet_estimate(r, x).stderr_sampling)
    assert found.stderr_reference is None
    assert "the reference is a mean and a covariance" in found.why
    pool = x.astype(np.float32)
    carried = batch(pool=pool, gaussians={"pool": Moments.of(r).gaussian()})
    of_reference = FID.influence(carried, batch(pool=pool), NO_STORE)["fid"]
    assert of_reference.reference is None
    assert "mean and covariance" in of_reference.no_reference
    with pytest.raises(UndefinedMetricError, match="of batch, mean and covariance are used"):
        FID.influence(batch(pool=pool), carried, NO_STORE)


def test_bad_features_are_refused():
    broken = rows(50, 0)
    broken[7, 3] = np.nan
    with pytest.raises(FeatureError, match="samples: the features of image 7"):
        frechet_estimate(rows(50, 0), broken)
    with pytest.raises(FeatureError, match="7 and of 5"):
        frechet_estimate(rows(50, 0), rows(50, 0, d=5))
    with pytest.raises(UndefinedMetricError, match="1 image"):
        frechet_estimate(rows(50, 0), rows(1, 0))
    with pytest.raises(FeatureError, match="expected"):
        frechet_estimate(rows(50, 0), np.ones((50, 7), np.uint8))


def test_inception_score_of_few_images_has_no_bias_and_of_one_no_error():
    logits = 9 * np.random.default_rng(0).normal(size=(40, 200))
    found = inception_influence(logits)
    assert found.stderr > 0
    assert found.bias is None
    assert "40 images are too few" in found.no_bias
    with pytest.raises(UndefinedMetricError, match="a split of one image"):
        inception_influence(logits, 39)


# The metrics -----------------------------------------------------------------------------------------------


def test_the_call_and_the_influence_share_their_work(monkeypatch):
    seen = []
    of = frechet._Side.of
    monkeypatch.setattr(frechet._Side, "of", lambda *given: seen.append(given) or of(*given))
    r, x = (batch(pool=rows(60, seed).astype(np.float32)) for seed in (0, 1))
    assert FID(r, x, NO_STORE)[0].value == frechet_distance(*(each.rows("inception:pool") for each in (r, x)))
    before = len(seen)
    FID.influence(r, x, NO_STORE)
    assert len(seen) == before
    other = batch(pool=rows(60, 2).astype(np.float32))
    FID.influence(r, other, NO_STORE)
    assert len(seen) == before + 1

    reported = []
    run = Run(device="cpu", progress=lambda *what: reported.append(what))
    metric = KernelDistance()
    assert metric(r, x, run)[0].value == polynomial_mmd(*(each.rows("inception:pool") for each in (r, x)))
    before = len(reported)
    metric.influence(r, x, run)
    assert len(reported) == before
    assert metric(r, other, run)[0].value != metric(r, x, run)[0].value
    assert KernelDistance(degree=2)(r, x, run)[0].value != metric(r, x, run)[0].value


def test_the_costliest_image_is_the_one_far_away():
    x = rows(100, 1)
    x[37] *= 6
    found = frechet_influence(Cloud.of(rows(100, 0)), Cloud.of(x))
    assert found.costliest(3, higher_is_better=False)[0] == 37
    assert found.costliest(200, higher_is_better=True)[-1] == 37
    exchanged = frechet_influence(Cloud.of(x), Cloud.of(rows(100, 0)))
    assert exchanged.costliest(1, higher_is_better=False, of_reference=True).tolist() == [37]
    with pytest.raises(UndefinedMetricError, match="does not look at the reference"):
        inception_influence(x).costliest(1, higher_is_better=True, of_reference=True)
    without = frechet_distance(rows(100, 0), np.delete(x, 37, axis=0))
    assert without < frechet_distance(rows(100, 0), x)


def test_balanced_classes_are_told_from_the_labels():
    assert balanced_classes(np.repeat(np.arange(10), 5)).tolist() == np.repeat(np.arange(10), 5).tolist()
    assert balanced_classes(np.arange(104) % 10) is not None  # give or take one
    assert balanced_classes(np.random.default_rng(0).integers(0, 10, 100)) is None
    assert balanced_classes(np.arange(50)) is None
    assert balanced_classes(np.zeros(50, np.int64)) is None
    assert balanced_classes(None) is None


def test_gaussians_of_few_images_are_singular():
    few = rows(5, 0)
    gaussian = Gaussian(few.mean(axis=0), np.cov(few.T), n=5)
    assert frechet_estimate(gaussian, rows(60, 1)).stderr is None
