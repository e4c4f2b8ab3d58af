"""MIND against torch-fidelity's convention, its influence against derivatives, its error against draws."""

import numpy as np
import pytest
import torch
from optional import optional
from stand_ins import batch

from evalkit.errors import InputError, UndefinedMetricError
from evalkit.metrics import mind
from evalkit.metrics.mind import MIND, monge_inception_distance
from evalkit.system.run import Run


def rows(rng, n, d=10, shift=0.0):
    return (rng.normal(size=(n, d)) ** 3 / 3 * (1 + shift) + shift).astype(np.float32)


def written_out(reference, samples, directions=1000, seed=2020):
    """One direction after the other, with everything that is drawn in torch-fidelity's order."""
    generator = torch.Generator().manual_seed(seed)
    n, d = min(len(reference), len(samples)), samples.shape[1]
    if len(samples) > n:
        samples = samples[torch.randperm(len(samples), generator=generator).numpy()[:n]]
    if len(reference) > n:
        reference = reference[torch.randperm(len(reference), generator=generator).numpy()[:n]]
    drawn = torch.randn((directions, d), generator=generator).numpy().astype(np.float64)
    found = []
    for direction in drawn:
        u = direction / np.linalg.norm(direction)
        found.append(np.mean((np.sort(samples @ u) - np.sort(reference @ u)) ** 2))
    return 3 * d * np.mean(found)


@pytest.mark.parametrize(("m", "n"), [(60, 60), (50, 80), (80, 50)])
def test_it_is_the_definition(m, n, monkeypatch):
    rng = np.random.default_rng(0)
    reference, samples = rows(rng, m), rows(rng, n, shift=0.2)
    expected = written_out(reference, samples)
    assert monge_inception_distance(reference, samples).value == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(mind, "_ROWS", 17)
    monkeypatch.setattr(mind, "_PROJECTIONS", 1000)
    assert monge_inception_distance(reference, samples).value == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("torchvision_stand_in")
@pytest.mark.parametrize(("m", "n"), [(60, 60), (50, 80), (80, 50)])
def test_it_is_torch_fidelitys(m, n):
    metric_mind = optional("torch_fidelity.metric_mind", "crosscheck")  # later than 0.4.0
    rng = np.random.default_rng(0)
    reference, samples = rows(rng, m), rows(rng, n, shift=0.2)
    expected = metric_mind.mind_features_to_metric(
        torch.from_numpy(samples), torch.from_numpy(reference), cuda=False, verbose=False
    )
    found = monge_inception_distance(reference, samples).value
    assert found == pytest.approx(expected["monge_inception_distance"], rel=1e-5)


def weighted(x, y, v, w):
    """The squared Wasserstein distance of two sorted sets of numbers, from their quantile functions."""
    a, b = np.cumsum(v), np.cumsum(w)
    cuts = np.sort(np.concatenate([[0], a[:-1], b[:-1], [1]]))
    middle = (cuts[1:] + cuts[:-1]) / 2
    i, j = np.searchsorted(a, middle), np.searchsorted(b, middle)
    return np.sum(np.diff(cuts) * (x[np.minimum(i, len(x) - 1)] - y[np.minimum(j, len(y) - 1)]) ** 2)


def test_influence_is_the_derivative():
    rng = np.random.default_rng(1)
    n, d, directions = 30, 4, 3
    reference, samples = rows(rng, n, d), rows(rng, n, d, shift=0.3)
    found = monge_inception_distance(reference, samples, directions=directions)
    units = torch.randn(directions, d, generator=torch.Generator().manual_seed(2020)).numpy()
    units = units / np.linalg.norm(units, axis=1, keepdims=True)

    def score(v, w):
        total = 0.0
        for u in units:
            x, y = reference.astype(np.float64) @ u, samples.astype(np.float64) @ u
            p, q = np.argsort(x), np.argsort(y)
            total += weighted(x[p], y[q], v[p], w[q])
        return 3 * d * total / directions

    even, step = np.full(n, 1 / n), 1e-5
    assert score(even, even) == pytest.approx(found.value, rel=1e-6)
    for i in range(n):
        direction = step * (np.eye(n)[i] - even)
        of_samples = score(even, even + direction) - score(even, even - direction)
        of_reference = score(even + direction, even) - score(even - direction, even)
        assert found.influence.samples[i] == pytest.approx(of_samples / (2 * step), rel=1e-4, abs=1e-4)
        assert found.influence.reference[i] == pytest.approx(of_reference / (2 * step), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("m", "n", "shift", "low", "high"),
    [(200, 200, 0.3, 0.9, 1.15), (150, 260, 0.3, 0.9, 1.15), (200, 200, 0.0, 1.0, 1.6)],
)
def test_errors_are_those_of_new_draws(m, n, shift, low, high):
    """Also where only some samples are drawn. At equality they are known to be wide."""
    rng = np.random.default_rng(2)

    def draw(size, shift):
        return (rng.normal(size=(size, 8)) * (1 + shift) + shift).astype(np.float32)

    found = [monge_inception_distance(draw(m, 0), draw(n, shift), directions=16) for _ in range(400)]
    ratio = np.sqrt(np.mean([each.influence.stderr**2 for each in found])) / np.std([f.value for f in found])
    assert low < ratio < high


def test_bad_input_is_refused_and_progress_counts_directions(monkeypatch):
    rng = np.random.default_rng(3)
    x, y = rows(rng, 20), rows(rng, 20)
    with pytest.raises(InputError, match="directions is 0"):
        monge_inception_distance(x, y, directions=0)
    with pytest.raises(UndefinedMetricError, match=r"MIND of 1 image \(samples\) is undefined"):
        monge_inception_distance(x, y[:1])
    monkeypatch.setattr(mind, "_PROJECTIONS", 80)
    seen = []
    monge_inception_distance(x, y, directions=6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]


def test_the_metric_is_the_function():
    rng = np.random.default_rng(4)
    x, y = rows(rng, 40), rows(rng, 30)
    metric = MIND(directions=50, seed=1)
    (score,) = metric(batch(pool=x), batch(pool=y), Run(device="cpu"))
    expected = monge_inception_distance(x, y, directions=50, seed=1)
    assert (score.name, score.value) == ("mind", expected.value)
    assert score.parameters == {"output": "inception:pool", "directions": 50, "seed": 1}
    found = metric.influence(batch(pool=x), batch(pool=y), Run(device="cpu"))["mind"]
    np.testing.assert_array_equal(found.samples, expected.influence.samples)
