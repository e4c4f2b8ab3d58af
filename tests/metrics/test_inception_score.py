import numpy as np
import pytest
import torch
from optional import optional
from scipy.special import log_softmax
from stand_ins import NO_STORE, batch

from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.metrics.inception_score import (
    InceptionScore,
    ShuffledInceptionScore,
    inception_influence,
    inception_score,
)


def logits(n, classes=20, seed=0, scale=3.0):
    return (np.random.default_rng(seed).normal(size=(n, classes)) * scale).astype(np.float32)


def textbook(x):
    log_p = log_softmax(x.astype(np.float64), axis=1)
    p = np.exp(log_p)
    return np.exp(np.mean(np.sum(p * (log_p - np.log(p.mean(axis=0))), axis=1)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_score_equals_the_textbook_formula(dtype, tolerance):
    x = logits(2300)
    result = inception_score(x, split_size=1000, dtype=dtype)
    expected = [textbook(x[:1000]), textbook(x[1000:2000]), textbook(x[2000:])]
    np.testing.assert_allclose(result.splits, expected, rtol=tolerance)
    # The short last split weighs as much as the others.
    assert result.mean == pytest.approx(np.mean(expected), rel=tolerance)
    assert result.std == pytest.approx(np.std(expected), rel=1e-3)


def test_float32_is_the_reference_evaluators_arithmetic():
    x = logits(700)
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for i in range(0, len(p), 500):
        part = p[i : i + 500]
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    assert inception_score(x, 500).mean == float(np.mean(scores))


def test_one_class_each_scores_the_number_of_classes():
    # A softmax that underflows to exact zeros must not become NaN.
    result = inception_score(np.eye(8, dtype=np.float32) * 1000)
    assert result.mean == pytest.approx(8, rel=1e-6)


def test_a_class_that_nobody_has_adds_nothing():
    x = logits(100)
    x[:, 3] = -1e30
    expected = inception_score(np.delete(x, 3, axis=1), dtype="float64").mean
    assert inception_score(x, dtype="float64").mean == pytest.approx(expected, rel=1e-12)


def test_identical_images_score_one():
    assert inception_score(np.tile(logits(1), (50, 1))).mean == pytest.approx(1, abs=1e-6)


def test_a_single_split_has_no_standard_deviation():
    assert inception_score(logits(50)).std is None


def test_bad_input_is_refused():
    with pytest.raises(UndefinedMetricError, match="no images"):
        inception_score(logits(0))
    with pytest.raises(FeatureError, match="image 2 "):
        inception_score(np.float32([[1, 2], [3, 4], [np.inf, 0]]))
    with pytest.raises(InputError, match="split_size is 0"):
        inception_score(logits(5), 0)


def test_metric_looks_at_the_samples_only():
    metric = InceptionScore(split_size=40)
    (score,) = metric(batch(), batch(logits=logits(100)), NO_STORE)
    expected = inception_score(logits(100), 40)
    assert (metric.scores[0].name,) == (score.name,) == ("inception_score",)
    assert (score.value, score.std) == (expected.mean, expected.std)
    assert score.parameters == {"split_size": 40, "dtype": "float32"}
    with pytest.raises(UndefinedMetricError, match="has no logits features"):
        metric(batch(logits=logits(100)), batch(), NO_STORE)


@pytest.mark.usefixtures("torchvision_stand_in")
@pytest.mark.parametrize(("n", "splits"), [(200, 10), (203, 10), (50, 1)])
def test_shuffled_it_is_torch_fidelitys(n, splits):
    metric_isc = optional("torch_fidelity.metric_isc", "crosscheck")
    x = logits(n)
    expected = metric_isc.isc_features_to_metric(
        torch.from_numpy(x), splits=splits, shuffle=True, rng_seed=2020
    )
    (score,) = ShuffledInceptionScore(splits=splits)(batch(), batch(logits=x), NO_STORE)
    assert score.value == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert (score.std or 0.0) == pytest.approx(expected["inception_score_std"], rel=1e-9)
    assert score.parameters == {"splits": splits, "seed": 2020}


def test_shuffled_influence_values_are_those_of_the_images():
    x = logits(120)
    order = np.random.RandomState(7).permutation(120)
    found = ShuffledInceptionScore(splits=4, seed=7).influence(batch(), batch(logits=x), NO_STORE)
    expected = inception_influence(x[order], 30)
    np.testing.assert_allclose(found["inception_score"].samples[order], expected.samples, rtol=1e-12)
    assert found["inception_score"].bias == pytest.approx(expected.bias, rel=1e-12)


def test_shuffled_it_needs_an_image_for_each_split():
    with pytest.raises(UndefinedMetricError, match="of 9 images in 10 splits is undefined"):
        ShuffledInceptionScore()(batch(), batch(logits=logits(9)), NO_STORE)
    with pytest.raises(InputError, match="0 splits"):
        ShuffledInceptionScore(splits=0)(batch(), batch(logits=logits(9)), NO_STORE)
