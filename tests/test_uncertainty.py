"""Differences, their correction, several runs and sample sizes: against draws and worked examples."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from evalkit.deviations import Excess, HalfSplit, Influence
from evalkit.errors import InputError, UndefinedMetricError
from evalkit.metrics.frechet_influence import Cloud, Transport, frechet_influence
from evalkit.pairs import Difference
from evalkit.uncertainty import (
    detectable_difference,
    difference,
    difference_of_runs,
    holm,
    required_images,
    runs_of_one_setting,
)

D = 12
SPREAD = np.arange(1, D + 1) ** -0.5


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(rng, n, shift=0.0):
    return rng.normal(size=(n, D)) * SPREAD * (1 + shift) + 0.3 * shift


def of_mean(values, **more):
    """The influence of a mean, whose standard error every textbook has."""
    return Influence(images=len(values), samples=values - values.mean(), **more)


def frechet(reference, samples):
    """Unbiased distance and influence."""
    found = frechet_influence(reference, samples)
    return Transport(reference, samples).distance - found.bias, found


# Standard errors -------------------------------------------------------------------------------------------


def test_the_error_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(0).normal(size=50)
    assert of_mean(values).stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-12)
    both = of_mean(values, reference=values[:20] - values[:20].mean())
    assert both.stderr_reference == pytest.approx(values[:20].std(ddof=1) / math.sqrt(20), rel=1e-12)
    assert both.stderr == pytest.approx(math.hypot(both.stderr_sampling, both.stderr_reference), rel=1e-12)


def test_classes_of_fixed_numbers_have_the_stratified_error():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(4), [25, 25, 25, 24])
    values = rng.normal(size=99) + 3 * classes
    within = sum(25 / 99 * values[classes == c].var(ddof=1) for c in range(3))
    within += 24 / 99 * values[classes == 3].var(ddof=1)
    assert of_mean(values, classes=classes).stderr == pytest.approx(math.sqrt(within / 99), rel=1e-12)
    assert of_mean(values).stderr > 2 * of_mean(values, classes=classes).stderr


def test_excess_is_subtracted_up_to_half():
    values = np.random.default_rng(0).normal(size=100)
    plain = of_mean(values, reference=values - values.mean())
    variance = plain.stderr_sampling**2
    some = of_mean(
        values,
        reference=values - values.mean(),
        excess=Excess(0.1 * variance, 0.2 * variance, 0.3 * variance),
    )
    assert some.stderr_sampling**2 == pytest.approx(0.9 * variance)
    assert some.stderr_reference**2 == pytest.approx(0.8 * variance)
    assert some.stderr**2 == pytest.approx(1.4 * variance)
    other = of_mean(-values, reference=plain.reference, excess=some.excess)
    assert some.variance_of_difference(other, paired=False) == pytest.approx((2 - 0.8) * variance)
    assert of_mean(values, excess=Excess(variance)).stderr ** 2 == pytest.approx(0.5 * variance)


def test_the_error_of_a_share_by_halves_is_binomial():
    """Halves of a set of zeros and ones, written out."""
    rng = np.random.default_rng(0)
    inside = rng.random(400) < 0.3
    first = [inside[rng.permutation(400)[:200]].mean() for _ in range(2000)]
    differences = 2 * (np.array(first) - inside.mean())
    found = HalfSplit(
        images=400, samples=differences, reference=np.zeros(2000), both=differences, halves="400"
    )
    p = inside.mean()
    assert found.stderr_sampling == pytest.approx(math.sqrt(p * (1 - p) / 400), rel=0.05)
    assert found.stderr_reference == 0


def test_given_the_reference_only_the_samples_vary():
    rng = np.random.default_rng(0)
    influence = of_mean(
        rng.normal(size=50), reference=rng.normal(size=20), excess=Excess(0.003, 0.004, 0.001)
    )
    halves = HalfSplit(
        images=50,
        samples=rng.normal(size=9),
        reference=rng.normal(size=9),
        both=rng.normal(size=9),
        halves="",
    )
    for found in (influence, halves):
        given = found.given_reference()
        assert given.stderr == given.stderr_sampling == found.stderr_sampling != found.stderr
        assert given.stderr_reference is None
        assert given.variance_of_difference(given, paired=True) == 0
    given = influence.given_reference()
    assert given.variance_of_difference(given, paired=False) == pytest.approx(2 * given.stderr**2)


# Differences -----------------------------------------------------------------------------------------------


def test_a_paired_difference_is_the_paired_t_test():
    rng = np.random.default_rng(1)
    a = rng.normal(size=4000)
    b = 0.9 * a + 0.4 * rng.normal(size=4000) - 0.01
    paired = difference(a.mean(), b.mean(), of_mean(a), of_mean(b), paired=True)
    apart = difference(a.mean(), b.mean(), of_mean(a), of_mean(b), paired=False)
    assert paired.value == apart.value == pytest.approx(a.mean() - b.mean())
    assert paired.z == pytest.approx(stats.ttest_rel(a, b).statistic, rel=1e-9)
    assert paired.p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=0.01)
    assert apart.z == pytest.approx(stats.ttest_ind(a, b, equal_var=False).statistic, rel=1e-9)
    assert abs(paired.z) > 2 * abs(apart.z)


def test_pairing_counts_what_the_noise_has_in_common():
    """Samples of two models from noise with correlation 0.9: unpaired, the bar is much too wide."""
    rng = np.random.default_rng(2)
    values, paired, apart = [], [], []
    for _ in range(200):
        reference = Cloud.of(draw(rng, 300))
        noise, other = rng.normal(size=(2, 250, D))
        near = 0.9 * noise + math.sqrt(1 - 0.81) * other
        (a, of_a), (b, of_b) = (
            frechet(reference, Cloud.of(each * SPREAD * 1.3 + 0.1)) for each in (noise, near)
        )
        values.append(a - b)
        paired.append(of_a.variance_of_difference(of_b, paired=True))
        apart.append(of_a.variance_of_difference(of_b, paired=False))
    truth = np.std(values)
    assert 0.9 < math.sqrt(np.mean(paired)) / truth < 1.15
    assert math.sqrt(np.mean(apart)) / truth > 2


def test_a_sweep_tells_its_best_scale_by_pairs():
    """Three scales of the same noise, all narrower than the reference, the first the least: 20 sweeps."""
    rng = np.random.default_rng(5)
    found, told = {True: [], False: []}, {True: 0, False: 0}
    for _ in range(20):
        reference, noise = Cloud.of(1.5 * draw(rng, 300)), draw(rng, 250)
        scales = [frechet(reference, Cloud.of(width * noise)) for width in (1.03, 1.0, 0.97)]
        for paired in (True, False):
            pairs = [
                difference(a, b, of_a, of_b, paired=paired)
                for (a, of_a), (b, of_b) in itertools.combinations(scales, 2)
            ]
            found[paired].append([(pair.value, pair.stderr) for pair in pairs])
            told[paired] += max(holm([pair.p for pair in pairs])) < 0.05 and max(p.value for p in pairs) < 0
    assert told == {True: 20, False: 0}
    values, errors = np.moveaxis(np.array(found[True]), -1, 0)
    ratio = errors.mean(axis=0) / values.std(axis=0, ddof=1)
    assert (ratio > 0.6).all()  # 20 sweeps know a standard deviation to 16 %
    assert (ratio < 1.6).all()
    assert (np.array(found[False])[..., 1] > 4 * errors).all()


def test_two_halves_of_one_set_do_not_differ():
    """At 5 %, in 93 to 97 of 100 splits; their reference is of another distribution, as always."""
    rng = np.random.default_rng(3)
    x, reference = draw(rng, 4000, 0.5), Cloud.of(draw(rng, 2000))
    stands = []
    for _ in range(400):
        (a, of_a), (b, of_b) = (
            frechet(reference, Cloud.of(x[half])) for half in np.array_split(rng.permutation(4000), 2)
        )
        stands.append(difference(a, b, of_a, of_b, paired=False).p < 0.05)
    assert 0.93 <= 1 - np.mean(stands) <= 0.97


def test_a_true_difference_is_found():
    rng = np.random.default_rng(4)
    reference = Cloud.of(draw(rng, 2000))
    (a, of_a), (b, of_b) = (frechet(reference, Cloud.of(draw(rng, 1000, shift))) for shift in (0.3, 0.2))
    found = difference(a, b, of_a, of_b, paired=False)
    assert found.value > 0
    assert found.p < 1e-4
    back = difference(b, a, of_b, of_a, paired=False)
    assert (back.value, back.p, back.z) == pytest.approx((-found.value, found.p, -found.z))
    # The two have the reference in common, so their difference is known better than each.
    assert found.stderr < math.hypot(of_a.stderr, of_b.stderr)


def test_what_cannot_be_compared_is_refused():
    values = np.random.default_rng(0).normal(size=40)
    whole, half = of_mean(values), of_mean(values[:20])
    with pytest.raises(InputError, match="40 and of 20 images cannot be paired"):
        difference(1, 2, whole, half, paired=True)
    assert difference(1, 2, whole, half, paired=False).stderr > 0
    classes = np.repeat([0, 1], 20)
    with pytest.raises(InputError, match="classes differ"):
        difference(1, 2, of_mean(values, classes=classes), of_mean(values, classes=1 - classes), paired=True)
    with pytest.raises(InputError, match="different references"):
        difference(
            1, 2, of_mean(values, reference=values), of_mean(values, reference=values[:9]), paired=False
        )
    halves = HalfSplit(images=40, samples=values, reference=values, both=values, halves="40")
    with pytest.raises(InputError, match="different scores"):
        difference(1, 2, whole, halves, paired=False)
    others = HalfSplit(images=40, samples=values, reference=values, both=values, halves="40 otherwise")
    with pytest.raises(InputError, match="cannot be paired"):
        difference(1, 2, halves, others, paired=True)


def test_equal_scores_without_error_do_not_differ():
    same = of_mean(np.zeros(20))
    assert difference(2, 2, same, same, paired=True) == Difference(value=0, stderr=0, z=0, p=1, paired=True)
    with pytest.raises(UndefinedMetricError, match="standard error of zero"):
        difference(2, 3, same, same, paired=True)


# Holm ------------------------------------------------------------------------------------------------------


def test_holm_is_the_worked_example():
    # Sorted: .005 x 4, .01 x 3, .03 x 2, and .04 no smaller than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_closed_test_with_bonferroni(seed):
    """A hypothesis stands corrected at the largest p of all intersections that contain it."""
    p = np.random.default_rng(seed).random(5) ** 3
    found = holm(list(p))
    for i in range(5):
        sets = (s for size in range(1, 6) for s in itertools.combinations(range(5), size) if i in s)
        assert found[i] == pytest.approx(max(min(1, len(s) * min(p[list(s)])) for s in sets))


# Several runs ----------------------------------------------------------------------------------------------


def test_runs_are_split_into_between_and_sampling():
    rng = np.random.default_rng(5)
    found = [
        runs_of_one_setting(list(rng.normal(10, math.hypot(0.3, 0.1), size=4)), [0.1] * 4)
        for _ in range(3000)
    ]
    assert np.mean([each.between**2 for each in found]) == pytest.approx(0.3**2, rel=0.1)
    assert np.mean([each.stderr**2 for each in found]) == pytest.approx((0.3**2 + 0.1**2) / 4, rel=0.05)
    assert np.std([each.mean for each in found]) == pytest.approx(math.hypot(0.3, 0.1) / 2, rel=0.05)
    assert found[0].sampling == pytest.approx(0.1)
    assert found[0].runs == 4


def test_runs_that_differ_less_than_sampling_do_not_vary():
    assert runs_of_one_setting([2.0, 2.01], [0.5, 0.5]).between == 0
    one = runs_of_one_setting([2.0], [0.5])
    assert (one.mean, one.stderr, one.between) == (2.0, 0.5, None)
    with pytest.raises(InputError, match="0 values"):
        runs_of_one_setting([], [])
    with pytest.raises(InputError, match="2 values with 1 standard errors"):
        runs_of_one_setting([1.0, 2.0], [0.1])


def test_settings_are_compared_by_welch():
    a, b = [2.1, 2.3, 2.2, 2.6], [2.9, 2.7, 3.3]
    found = difference_of_runs(*(runs_of_one_setting(each, [0.01] * len(each)) for each in (a, b)))
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert found.z == pytest.approx(expected.statistic, rel=1e-9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    with pytest.raises(UndefinedMetricError, match="1 and 3 runs"):
        difference_of_runs(runs_of_one_setting([2.0], [0.1]), runs_of_one_setting(b, [0.1] * 3))
    same = runs_of_one_setting([2.0, 2.0], [0.0, 0.0])
    assert difference_of_runs(same, same).p == 1


# How many images -------------------------------------------------------------------------------------------


def test_the_required_images_have_the_power():
    """Means with a difference of 0.1 and images of variance 1: found in 80 % of draws of that size."""
    stderr = math.sqrt(2) * 1 / math.sqrt(100)
    n = required_images(0.1, stderr, 100)
    assert n == math.ceil(2 * (1.959964 + 0.841621) ** 2 / 0.01)
    rng = np.random.default_rng(6)
    z = (rng.normal(0.1, 1 / math.sqrt(n), 20_000) - rng.normal(0, 1 / math.sqrt(n), 20_000)) / math.sqrt(
        2 / n
    )
    assert np.mean(np.abs(z) > 1.959964) == pytest.approx(0.8, abs=0.01)
    assert detectable_difference(math.sqrt(2 / n)) == pytest.approx(0.1, rel=1e-3)
    assert required_images(-0.1, stderr, 100) == n


def test_a_reference_can_be_too_small_for_any_number():
    assert required_images(0.1, 0.02, 1000, fixed=0.02) > required_images(0.1, 0.02, 1000)
    too_small = r"the reference alone gives a standard error of 0\.04; give a larger reference$"
    with pytest.raises(UndefinedMetricError, match=too_small):
        required_images(0.1, 0.02, 1000, fixed=0.04)
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(InputError, match="expected a difference"):
            required_images(bad, 0.02, 1000)
    with pytest.raises(InputError, match="stderr=-1"):
        required_images(0.1, -1, 1000)
    for tiny in (1e-160, 1e-300):
        with pytest.raises(UndefinedMetricError, match="more images than can be counted"):
            required_images(tiny, 0.02, 1000)
    assert required_images(1e300, 0.02, 1000) == 2
