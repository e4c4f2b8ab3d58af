"""CMMD's distance against its definition, its influence against derivatives, its errors against new draws."""

import numpy as np
import pytest
from stand_ins import batch

from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.metrics import kernel
from evalkit.metrics.mmd_rbf import RBFDistance, rbf_mmd
from evalkit.system.run import Run


def rows(rng, n, d=8, shift=0.0):
    return (rng.normal(size=(n, d)) + 1 + shift).astype(np.float32)


def by_definition(x, y, v=None, w=None, sigma=10.0):
    """Of weighted images."""
    x, y = (each / np.linalg.norm(each, axis=1)[:, None] for each in (x.astype(float), y.astype(float)))
    v, w = (np.full(len(each), 1 / len(each)) if u is None else u for each, u in ((x, v), (y, w)))

    def mean(a, b, of_a, of_b):
        squares = np.sum((a[:, None] - b) ** 2, axis=2)
        return of_a @ np.exp(-squares / (2 * sigma**2)) @ of_b

    return 1000 * (mean(x, x, v, v) + mean(y, y, w, w) - 2 * mean(x, y, v, w))


@pytest.mark.parametrize("block", [4096, 7])
@pytest.mark.parametrize("sigma", [10.0, 0.7])
def test_it_is_the_definition(block, sigma, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", block)
    rng = np.random.default_rng(0)
    x, y = rows(rng, 23), 5 * rows(rng, 31, shift=0.2)
    found = rbf_mmd(x, y, sigma=sigma)
    assert found.value == pytest.approx(by_definition(x, y, sigma=sigma), rel=1e-9)
    assert rbf_mmd(x, 3 * x).value == pytest.approx(0, abs=1e-9)


def test_influence_is_the_derivative():
    rng = np.random.default_rng(1)
    x, y = rows(rng, 20), rows(rng, 30, shift=0.3)
    found = rbf_mmd(x, y, sigma=1.5).influence()
    for i in range(8):
        for side, values in ((0, found.reference), (1, found.samples)):
            n = len((x, y)[side])
            ahead, behind = (
                [None if s != side else 1 / n + sign * 1e-4 * (np.eye(n)[i] - 1 / n) for s in (0, 1)]
                for sign in (1, -1)
            )
            slope = (by_definition(x, y, *ahead, 1.5) - by_definition(x, y, *behind, 1.5)) / 2e-4
            assert values[i] == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_without_its_bias_it_is_of_pairs_of_different_images():
    rng = np.random.default_rng(5)
    x, y = rows(rng, 20), rows(rng, 30, shift=0.3)
    found = rbf_mmd(x, y)
    # The mean of 1 - k over different images, over their number.
    excess = sum(within(each) / (len(each) - 1) for each in (x, y))
    assert found.bias == pytest.approx(excess, rel=1e-9)
    assert found.influence().bias == found.bias


def within(x):
    """``1000 (1 - mean k)`` over all pairs, of an image with itself too."""
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
    return 1000 * (1 - np.exp((unit @ unit.T - 1) / 100).mean())


@pytest.mark.parametrize(("shift", "low", "high"), [(0.3, 0.9, 1.15), (0.0, 0.9, 1.25)])
def test_errors_and_bias_are_those_of_new_draws(shift, low, high):
    rng = np.random.default_rng(2)
    found = [rbf_mmd(rows(rng, 100), rows(rng, 140, shift=shift)) for _ in range(400)]
    values, errors, biases = np.array(
        [(each.value, each.influence().stderr, each.influence().bias) for each in found]
    ).T
    assert low < np.sqrt(np.mean(errors**2)) / values.std() < high
    if shift == 0:  # then it is zero but for the bias
        noise = values.std() / 20
        assert abs((values - biases).mean()) < 4 * noise
        assert values.mean() > 10 * noise


def test_bad_input_is_refused():
    rng = np.random.default_rng(3)
    x = rows(rng, 9)
    zero = x.copy()
    zero[4] = 0
    with pytest.raises(UndefinedMetricError, match=r"image 4 \(samples\) are all zero"):
        rbf_mmd(x, zero)
    with pytest.raises(UndefinedMetricError, match=r"1 image \(reference\)"):
        rbf_mmd(x[:1], x)
    with pytest.raises(FeatureError, match="8 and of 3"):
        rbf_mmd(x, x[:, :3])
    with pytest.raises(InputError, match="sigma is 0"):
        rbf_mmd(x, x, sigma=0)


def test_the_metric_is_the_function():
    rng = np.random.default_rng(4)
    x, y = rows(rng, 30), rows(rng, 40)
    metric = RBFDistance(sigma=2.0)
    (score,) = metric(batch(pool=x), batch(pool=y), Run(device="cpu"))
    assert (score.name, score.value) == ("mmd_rbf", rbf_mmd(x, y, sigma=2.0).value)
    assert score.parameters == {"output": "inception:pool", "sigma": 2.0}
