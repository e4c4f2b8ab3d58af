"""KID against its definition and against torch-fidelity's."""

import numpy as np
import pytest
from optional import optional
from stand_ins import batch

from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.metrics import kernel
from evalkit.metrics.kernel import KernelDistance, polynomial_mmd
from evalkit.system.run import Run


def rows(n, seed=0, d=24, offset=0.0):
    return (np.random.default_rng(seed).normal(size=(n, d)) + offset).astype(np.float32)


def by_definition(x, y):
    def k(u, v):
        return (float(u.astype(np.float64) @ v.astype(np.float64)) / len(u) + 1) ** 3

    def within(a):
        n = len(a)
        return sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    return within(x) + within(y) - 2 * np.mean([[k(u, v) for v in y] for u in x])


@pytest.mark.parametrize("block", [4096, 7])
def test_it_is_the_definition(block, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", block)
    x, y = rows(23), rows(31, seed=1, offset=0.2)
    assert polynomial_mmd(x, y) == pytest.approx(by_definition(x, y), rel=1e-11)


@pytest.mark.usefixtures("torchvision_stand_in")
def test_it_is_torch_fidelitys_of_one_subset_of_all():
    metric_kid = optional("torch_fidelity.metric_kid", "crosscheck")
    x, y = rows(200, d=64), rows(200, seed=1, d=64, offset=0.1)
    expected = metric_kid.kernel_mmd(x.astype(np.float64), y.astype(np.float64))
    assert polynomial_mmd(x, y) == pytest.approx(float(expected), rel=1e-10)


def test_it_is_unbiased():
    """Of halves of one set it is zero in the mean, and negative about half of the time."""
    found = [polynomial_mmd(*np.split(rows(40, seed=seed, d=8), 2)) for seed in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert 0.3 < np.mean(np.array(found) < 0) < 0.8


def test_progress_counts_every_row_once():
    seen = []
    polynomial_mmd(rows(10), rows(20, seed=1), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 40), (30, 40), (40, 40)]


def test_bad_input_is_refused():
    with pytest.raises(UndefinedMetricError, match=r"1 image \(samples\)"):
        polynomial_mmd(rows(5), rows(1))
    with pytest.raises(FeatureError, match="24 and of 8"):
        polynomial_mmd(rows(5), rows(5, d=8))


def test_the_metric_is_the_function():
    x, y = rows(30), rows(40, seed=1)
    (score,) = KernelDistance(degree=2)(batch(pool=x), batch(pool=y), Run(device="cpu"))
    assert (score.name, score.value) == ("kid", polynomial_mmd(x, y, degree=2))
    assert score.parameters == {"output": "inception:pool", "degree": 2}
