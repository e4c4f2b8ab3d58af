"""Vendi score against its definition, its influence against derivatives, error and bias against new draws."""

import numpy as np
import pytest
from stand_ins import batch

from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.metrics import vendi
from evalkit.metrics.vendi import Vendi, spectrum_of, vendi_influence, vendi_score
from evalkit.system.run import Run

D = 10


def rows(rng, n, d=D):
    """Directions that are not equally likely, around a common one."""
    return (rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -0.5 + 0.4).astype(np.float32)


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1)[:, None]


def by_definition(x, w=None):
    """From the similarities of all pairs of weighted images."""
    root = np.sqrt(np.full(len(x), 1 / len(x)) if w is None else w)
    lam = np.linalg.eigvalsh(root[:, None] * (unit(x) @ unit(x).T) * root)
    lam = lam[lam > 1e-12]
    return np.exp(-np.sum(lam * np.log(lam)))


@pytest.mark.parametrize(("n", "d"), [(50, 7), (7, 7), (6, 40), (1, 5)])
def test_it_is_the_definition(n, d, monkeypatch):
    x = rows(np.random.default_rng(0), n, d)
    assert vendi_score(x) == pytest.approx(by_definition(x), rel=1e-9)
    monkeypatch.setattr(vendi, "_ROWS", 4)
    assert vendi_score(1024 * x) == pytest.approx(by_definition(x), rel=1e-9)


def test_it_counts_what_is_different():
    basis = np.repeat(np.eye(8, dtype=np.float32), 5, axis=0)
    assert vendi_score(basis) == pytest.approx(8)
    assert vendi_score(basis[:5]) == pytest.approx(1)
    assert vendi_score(basis[:20, :30]) == pytest.approx(4)


def test_influence_is_the_derivative():
    x = rows(np.random.default_rng(1), 40)
    found = vendi_influence(x, spectrum_of(x))
    even, step = np.full(40, 1 / 40), 1e-5
    for i in range(40):
        direction = step * (np.eye(40)[i] - even)
        slope = (by_definition(x, even + direction) - by_definition(x, even - direction)) / (2 * step)
        assert found.samples[i] == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_the_bias_is_of_second_derivatives():
    """Half of the mean second derivative in the weight of an image, over n, of the entropy."""
    n, step = 60, 1e-3
    x = rows(np.random.default_rng(2), n, 4)
    even = np.full(n, 1 / n)

    def entropy(w):
        return np.log(by_definition(x, w))

    curvature = np.mean(
        [
            (entropy(even + direction) - 2 * entropy(even) + entropy(even - direction)) / step**2
            for direction in step * (np.eye(n) - even)
        ]
    )
    found = vendi_influence(x, spectrum_of(x))
    score = vendi_score(x)
    squared = np.var(found.samples / score) / n
    unbiased = score * np.exp(-curvature / (2 * n)) * (1 - squared / 2)
    assert found.bias == pytest.approx(score - unbiased, rel=1e-3)


@pytest.mark.parametrize("n", [100, 400])
def test_error_and_bias_are_those_of_new_draws(n):
    rng = np.random.default_rng(3)
    truth = vendi_score(rows(rng, 400_000))
    found = []
    for _ in range(400):
        x = rows(rng, n)
        spectrum = spectrum_of(x)
        influence = vendi_influence(x, spectrum)
        found.append((np.exp(spectrum.entropy), influence.stderr, influence.bias))
    values, errors, biases = np.array(found).T
    assert 0.9 < np.sqrt(np.mean(errors**2)) / values.std() < 1.15
    noise = values.std() / 20
    assert truth - values.mean() > 5 * noise
    assert abs((values - biases).mean() - truth) < 0.15 * (truth - values.mean()) + 3 * noise


def test_what_has_no_error_bar_says_why():
    x = rows(np.random.default_rng(4), 30)
    for n in (5, D):
        with pytest.raises(UndefinedMetricError, match=f"{n} images of 10 features do not show"):
            vendi_influence(x[:n], spectrum_of(x[:n]))
    isotropic = np.random.default_rng(5).normal(size=(60, 50)).astype(np.float32)
    found = vendi_influence(isotropic, spectrum_of(isotropic))
    assert found.bias is None
    assert "60 images are too few" in found.no_bias
    # A feature that is always zero changes nothing.
    padded = np.pad(x, ((0, 0), (0, 1)))
    expected = vendi_influence(x, spectrum_of(x)).stderr
    assert vendi_influence(padded, spectrum_of(padded)).stderr == pytest.approx(expected, rel=1e-9)


def test_bad_input_is_refused():
    x = rows(np.random.default_rng(6), 9)
    x[3] = 0
    with pytest.raises(UndefinedMetricError, match=r"image 3 \(samples\) are all zero"):
        vendi_score(x)
    with pytest.raises(UndefinedMetricError, match="no images"):
        vendi_score(x[:0])
    x[3, 0] = np.nan
    with pytest.raises(FeatureError, match="image 3"):
        vendi_score(x)


def test_the_metric_is_the_function(monkeypatch):
    x = rows(np.random.default_rng(7), 30)
    samples, run = batch(pool=x), Run(device="cpu")
    (score,) = Vendi()(batch(pool=x[:3]), samples, run)
    assert (score.name, score.value) == ("vendi", vendi_score(x))
    assert score.parameters == {"output": "inception:pool"}
    monkeypatch.setattr(vendi, "spectrum_of", None)  # it is not computed again
    found = Vendi().influence(batch(), samples, run)["vendi"]
    np.testing.assert_array_equal(found.samples, vendi_influence(x, spectrum_of(x)).samples)
