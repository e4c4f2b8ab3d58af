"""KID of subsets against torch-fidelity's own code, and its error bar against replicated draws."""

import numpy as np
import pytest
import torch
from optional import optional
from stand_ins import batch

from evalkit.errors import InputError, UndefinedMetricError
from evalkit.metrics.kernel import kernel_means
from evalkit.metrics.kernel_subsets import SubsetKernelDistance, subset_kernel_means
from evalkit.system.run import Run


def rows(rng, n, d=16, shift=0.0):
    return (rng.normal(size=(n, d)) * (1 + shift) + 0.3 * shift).astype(np.float32)


@pytest.mark.usefixtures("torchvision_stand_in")
@pytest.mark.parametrize(("n", "m", "size"), [(150, 120, 50), (90, 90, 90)])
def test_it_is_torch_fidelitys(n, m, size):
    metric_kid = optional("torch_fidelity.metric_kid", "crosscheck")
    rng = np.random.default_rng(0)
    samples, reference = rows(rng, n, 64, 0.1), rows(rng, m, 64)
    expected = metric_kid.kid_features_to_metric(
        torch.from_numpy(samples).double(),
        torch.from_numpy(reference).double(),
        kid_subsets=20,
        kid_subset_size=size,
        verbose=False,
    )
    values = subset_kernel_means(reference, samples, subsets=20, subset_size=size).values
    assert values.mean() == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert values.std() == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6, abs=1e-15)


def test_of_all_images_it_is_the_estimate_without_subsets():
    rng = np.random.default_rng(1)
    reference, samples = rows(rng, 60), rows(rng, 60, shift=0.2)
    found = subset_kernel_means(reference, samples, subsets=3)
    expected = kernel_means(reference, samples)
    np.testing.assert_allclose(found.values, expected.value, rtol=1e-10)
    np.testing.assert_allclose(found.influence.samples, expected.influence().samples, rtol=1e-8)
    np.testing.assert_allclose(found.influence.reference, expected.influence().reference, rtol=1e-8)
    assert found.influence.stderr == pytest.approx(expected.influence().stderr, rel=1e-9)


@pytest.mark.parametrize(
    ("subsets", "size", "shift", "low", "high"),
    [(3, 40, 0.4, 0.9, 1.15), (8, 60, 0.4, 0.9, 1.15), (8, 60, 0.0, 0.9, 1.15)],
)
def test_errors_are_those_of_new_draws(subsets, size, shift, low, high):
    """Where images are in one subset or in none, and where many are in several."""
    rng = np.random.default_rng(2)
    found = [
        subset_kernel_means(rows(rng, 120), rows(rng, 150, shift=shift), subsets=subsets, subset_size=size)
        for _ in range(500)
    ]
    truth = np.std([each.values.mean() for each in found])
    ratio = np.sqrt(np.mean([each.influence.stderr**2 for each in found])) / truth
    assert low < ratio < high


def test_progress_counts_subsets_and_bad_input_is_refused():
    rng = np.random.default_rng(3)
    x, y = rows(rng, 20), rows(rng, 30)
    seen = []
    subset_kernel_means(x, y, subsets=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    for wrong in ({"subsets": 0}, {"subset_size": 1}):
        with pytest.raises(InputError, match="expected at least 1 of at least 2"):
            subset_kernel_means(x, y, **wrong)
    with pytest.raises(UndefinedMetricError, match=r"1 image \(samples\)"):
        subset_kernel_means(x, y[:1])


def test_the_metric_says_how_large_its_subsets_were():
    rng = np.random.default_rng(4)
    x, y = rows(rng, 40), rows(rng, 30)
    metric = SubsetKernelDistance(subsets=5, subset_size=25, seed=1)
    (score,) = metric(batch(pool=x), batch(pool=y), Run(device="cpu"))
    values = subset_kernel_means(x, y, subsets=5, subset_size=25, seed=1).values
    assert (score.value, score.std) == (values.mean(), values.std())
    assert score.parameters["subset_size"] == 25
    (score,) = SubsetKernelDistance(subsets=2)(batch(pool=x), batch(pool=y), Run(device="cpu"))
    assert score.parameters["subset_size"] == 30
