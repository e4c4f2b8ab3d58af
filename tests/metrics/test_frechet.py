import copy
import pickle

import numpy as np
import pytest
import torch
from scipy import linalg
from stand_ins import NO_STORE, batch

from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.features.moments import Gaussian, Moments
from evalkit.metrics import frechet
from evalkit.metrics.frechet import FID, SFID, frechet_distance, is_rank_deficient


def features(n, d=24, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + offset).astype(np.float32)


def statistics(x):
    return Gaussian(x.mean(axis=0, dtype=np.float64), np.cov(x, rowvar=False))


def by_matrix_square_root(a, b):
    """The textbook formula, in float64."""
    p, q = statistics(a), statistics(b)
    root = linalg.sqrtm(p.covariance @ q.covariance)
    return np.sum((p.mean - q.mean) ** 2) + np.trace(p.covariance + q.covariance - 2 * root.real)


@pytest.fixture(params=[None, torch.device("cpu")], ids=["blas", "torch"])
def device(request):
    """Device of the sums; torch on the CPU runs the same code as on a GPU."""
    return request.param


def test_moments_equal_numpy(device):
    x = features(9000, offset=3.0)
    moments = Moments(24, device)
    moments.update(x)
    assert moments.n == 9000
    np.testing.assert_allclose(moments.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "other", [np.ndarray.byteswap, np.flip, np.asfortranarray], ids=["swapped", "flipped", "columns"]
)
def test_moments_of_any_layout(device, other):
    x = features(200)
    given = other(x)
    given = given.view(given.dtype.newbyteorder()) if other is np.ndarray.byteswap else given
    np.testing.assert_allclose(
        Moments.of(given, device).covariance,
        np.cov(given.astype(np.float64), rowvar=False),
        rtol=1e-12,
        atol=1e-12,
    )


def test_moments_survive_a_large_offset(device):
    x = features(5000).astype(np.float64) + 1e4
    moments = Moments(24, device)
    moments.update(x)
    # The offset is subtracted exactly, and NumPy then has nothing to cancel.
    expected = np.cov(x - 1e4, rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("cuts", [(1, 2, 3), (0, 500, 500), (4096, 4097, 6000)])
def test_merged_moments_equal_one_pass(cuts, device):
    x = features(7000, offset=-2.0)
    whole, merged = Moments(24, device), Moments(24, device)
    whole.update(x)
    for part in np.split(x, cuts):
        worker = Moments(24, device)
        worker.update(part)
        merged.merge(worker)
    assert merged.n == whole.n
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    scale = np.abs(whole.covariance).max()
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=0, atol=1e-12 * scale)


def test_merge_leaves_the_other_unchanged(device):
    a, b = Moments(24, device), Moments(24, device)
    a.update(features(50))
    b.update(features(60, seed=1))
    before = b.covariance
    a.merge(b)
    a.update(features(10))
    np.testing.assert_array_equal(b.covariance, before)


def test_moments_go_on_with_the_same_bits(device):
    x = features(900, offset=1.0)
    whole = Moments(24, device)
    whole.update(x[:500])
    copied, restored = copy.deepcopy(whole), Moments(24, device)
    restored.restore(whole.state())
    with torch.inference_mode():  # as in a validation loop
        for moments in (whole, copied, restored):
            moments.update(x[500:])
            moments.merge(copy.deepcopy(moments))
    for moments in (copied, restored):
        assert moments.n == whole.n == 1800
        np.testing.assert_array_equal(moments.mean, whole.mean)
        np.testing.assert_array_equal(moments.covariance, whole.covariance)


def test_pickled_moments_need_no_gpu():
    there = Moments.of(features(200), torch.device("cpu"))
    here = pickle.loads(pickle.dumps(there))
    np.testing.assert_array_equal(here.covariance, there.covariance)
    a, b = Moments.of(features(100, seed=1)), Moments.of(features(100, seed=1), torch.device("cpu"))
    for moments in (a, b):
        moments.merge(here)
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-12)
    assert a.n == b.n == 300


def test_a_gpu_makes_the_covariances(monkeypatch):
    a, b = (batch(pool=features(400, seed=seed)) for seed in (0, 1))
    expected = FID(a, b, NO_STORE)[0].value, FID.influence(a, b, NO_STORE)["fid"].samples
    asked = []

    def accelerator(name):
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr(frechet, "accelerator", accelerator)
    a, b = (batch(pool=features(400, seed=seed)) for seed in (0, 1))
    assert FID(a, b, NO_STORE)[0].value == pytest.approx(expected[0], rel=1e-9)
    np.testing.assert_allclose(FID.influence(a, b, NO_STORE)["fid"].samples, expected[1], rtol=1e-6)
    assert asked == [NO_STORE.device] * 2  # once for each side


def test_moments_of_too_few_rows_are_undefined():
    moments = Moments(3)
    with pytest.raises(UndefinedMetricError, match="no images"):
        _ = moments.mean
    moments.update(np.ones((1, 3), np.float32))
    with pytest.raises(UndefinedMetricError, match="covariance of 1 images"):
        _ = moments.covariance


def test_moments_refuse_other_widths_and_bad_values():
    moments = Moments(3)
    with pytest.raises(FeatureError, match=r"\(2, 4\)"):
        moments.update(np.ones((2, 4), np.float32))
    with pytest.raises(FeatureError, match="image 1"):
        moments.update(np.array([[1, 2, 3], [1, np.nan, 3]], np.float32))
    with pytest.raises(FeatureError, match="4 features"):
        moments.merge(Moments(4))


def test_distance_equals_the_textbook_formula():
    a, b = features(400), features(300, seed=1, offset=0.3)
    expected = by_matrix_square_root(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(statistics(a), b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, statistics(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-9)


def test_distance_of_commuting_gaussians_is_known():
    rng = np.random.default_rng(0)
    basis = linalg.qr(rng.normal(size=(16, 16)))[0]
    p, q, shift = rng.uniform(1e-6, 4, 16), rng.uniform(1e-6, 4, 16), rng.normal(size=16)
    a = Gaussian(np.zeros(16), basis @ np.diag(p) @ basis.T)
    b = Gaussian(shift, basis @ np.diag(q) @ basis.T)
    expected = shift @ shift + np.sum((np.sqrt(p) - np.sqrt(q)) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(10, 15), (15, 400), (400, 15), (24, 25), (25, 24), (2, 2)])
def test_rank_deficient_sides_agree_in_every_representation(n, m):
    a, b = features(n, seed=2), features(m, seed=3, offset=1.0)
    expected = frechet_distance(a, b)
    assert frechet_distance(statistics(a), b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, statistics(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_rank_one_sides_are_known():
    # Two points each: sigma = v v^T / 2 with v their difference, so the trace term is |v.w| / 2.
    a, b = np.float32([[0, 0], [2, 0]]), np.float32([[0, 0], [1, 1]])
    assert frechet_distance(a, b) == pytest.approx(0.25 + 0.25 + 2 + 1 - 2 * abs(2 * 1) / 2, rel=1e-12)


@pytest.mark.parametrize("n", [5, 24, 25, 500])
def test_distance_to_itself_is_zero(n):
    x = features(n, offset=5.0)
    for side in (x, statistics(x)):
        assert 0 <= frechet_distance(side, x) < 1e-6


def test_constant_features_have_a_distance():
    a = np.ones((30, 4), np.float32)
    assert frechet_distance(a, a + 2) == pytest.approx(16)
    assert frechet_distance(statistics(a), statistics(a + 2)) == pytest.approx(16)


def test_float32_means_are_numpys():
    # 0.1 summed 10,000 times in float32 is visibly off, and the reference evaluator shares that.
    a = np.full((10_000, 2), 0.1, np.float32) + np.float32(1000)
    b = np.zeros((3, 2), np.float32)
    mean = a.mean(axis=0)
    assert frechet_distance(a, b, mean_dtype="float32") == pytest.approx(float(mean @ mean), rel=1e-6)
    exact = a.mean(axis=0, dtype=np.float64)
    assert frechet_distance(a, b) == pytest.approx(float(exact @ exact), rel=1e-12)


def test_one_image_is_undefined():
    with pytest.raises(UndefinedMetricError, match="1 image"):
        frechet_distance(features(1), features(30))


def test_mixed_dimensions_are_refused():
    with pytest.raises(FeatureError, match="24 and of 8"):
        frechet_distance(features(30), features(30, d=8))


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(3), np.eye(4), r"\(3,\).*\(4, 4\)"),
        (np.zeros((3, 1)), np.eye(3), r"\(3, 1\)"),
        (np.array([0, np.nan]), np.eye(2), "NaN"),
        (np.zeros(2), np.array([[1, 0.5], [0, 1]]), "not symmetric"),
    ],
)
def test_bad_statistics_are_refused(mu, sigma, message):
    with pytest.raises(FeatureError, match=message):
        Gaussian(mu, sigma)


def test_a_sigma_with_negative_eigenvalues_is_refused():
    with pytest.raises(FeatureError, match="eigenvalue -1"):
        frechet_distance(Gaussian(np.zeros(2), np.diag([1.0, -1.0])), Gaussian(np.zeros(2), np.eye(2)))


def test_float32_sigmas_are_accepted():
    a, b = features(300), features(300, seed=1)
    rounded = Gaussian(a.mean(axis=0), np.cov(a, rowvar=False).astype(np.float32))
    assert frechet_distance(rounded, b) == pytest.approx(frechet_distance(a, b), rel=1e-4)


def test_rank_deficiency_is_told_from_the_shape():
    assert is_rank_deficient(2048, 2048)
    assert not is_rank_deficient(2049, 2048)


def test_carried_statistics_replace_the_features():
    a, b = features(60), features(50, seed=1)
    carried = batch(pool=a, gaussians={"pool": statistics(b)})
    (score,) = FID(carried, batch(pool=b), NO_STORE)
    assert score.name == "fid"
    assert not FID.scores[0].higher_is_better
    assert score.value < 1e-6


def test_sfid_uses_the_spatial_features():
    a, b = features(60), features(50, seed=1)
    (score,) = SFID(batch(spatial=a), batch(spatial=b), NO_STORE)
    assert (SFID.scores[0].name,) == (score.name,) == ("sfid",)
    assert score.value == frechet_distance(a, b)
    with pytest.raises(UndefinedMetricError, match="no spatial features"):
        SFID(batch(pool=a), batch(spatial=b), NO_STORE)
