"""FDr6 against its formula, its influence values against those of its terms and against new draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg

from evalkit.errors import InputError, UndefinedMetricError
from evalkit.features.moments import Moments
from evalkit.features.record import BatchFeatures, Features
from evalkit.metrics.base import influence_of
from evalkit.metrics.fdr6 import FDr6, mean_influence
from evalkit.metrics.frechet import FrechetDistance, frechet_distance
from evalkit.metrics.frechet_influence import Cloud, frechet_influence
from evalkit.system.run import Run

CPU = Run(store=None, device="cpu")
METRIC = FDr6()
Rows = NDArray[np.float32]


def side(rows: Rows, *, labels: NDArray[np.int64] | None = None, as_gaussian: tuple[str, ...] = ()) -> Any:
    """A batch of which each network sees something else: a fixed projection of the same images."""
    features = []
    for number, term in enumerate(METRIC.terms):
        network, _, output = term.output.partition(":")
        basis = np.random.default_rng(number).normal(size=(rows.shape[1], 4)) * (number + 1)
        array = np.tanh(rows @ basis).astype(np.float32)
        gaussians = {output: Moments.of(array).gaussian()} if network in as_gaussian else {}
        features.append(
            Features(
                name="batch",
                digest="",
                network=network,
                extractor=network,
                fingerprint="",
                arrays={output: array},
                gaussians=gaussians,
                labels=labels,
            )
        )
    return BatchFeatures.of(*features)


def images(seed: int, n: int = 300, shift: float = 0.0) -> Rows:
    return (np.random.default_rng(seed).normal(size=(n, 6)) * (1 + shift / 2) + shift).astype(np.float32)


def distance(x: Rows, y: Rows) -> float:
    a, b = (np.cov(each.astype(np.float64), rowvar=False) for each in (x, y))
    root = linalg.sqrtm(a @ b).real
    means = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    return float(means @ means + np.trace(a + b - 2 * root))


def test_it_is_the_mean_of_the_published_ratios() -> None:
    reference, samples = side(images(0)), side(images(1, shift=0.2))
    scores = {score.name: score for score in METRIC(reference, samples, CPU)}
    published = {
        "fdr_inception": ("inception:pool", 1.68),
        "fdr_convnextv2": ("convnextv2_base:pool", 56.87),
        "fdr_dinov2": ("dinov2_vitl14_fdr6:class_token", 14.19),
        "fdr_mae": ("mae_vitl16:class_token", 0.04),
        "fdr_siglip2": ("siglip2_so400m:embedding", 0.60),
        "fdr_clip": ("clip_vitl14_fdr6:class_token", 5.60),
    }
    assert list(scores) == ["fdr6", *published]
    for name, (output, constant) in published.items():
        expected = distance(reference.rows(output), samples.rows(output))
        assert scores[name].value == pytest.approx(expected / constant, rel=1e-5)
        assert scores[name].parameters["distance"] == pytest.approx(expected, rel=1e-5)
        assert scores[name].parameters["validation_distance"] == constant
    mean = sum(scores[name].value for name in published) / 6
    assert scores["fdr6"].value == pytest.approx(mean, rel=1e-12)


def test_the_influence_is_the_mean_of_those_of_the_terms() -> None:
    reference, samples = side(images(0)), side(images(1, shift=0.2))
    found: Any = influence_of(METRIC, reference, samples, CPU)
    expected = []
    for term in METRIC.terms:
        one: Any = FrechetDistance(output=term.output).influence(reference, samples, CPU)["fid"]
        np.testing.assert_allclose(found[term.name].samples, one.samples / term.validation)
        assert found[term.name].stderr == pytest.approx(one.stderr / term.validation)
        assert found[term.name].bias == pytest.approx(one.bias / term.validation)
        expected.append(found[term.name])
    whole = found["fdr6"]
    np.testing.assert_allclose(whole.samples, np.mean([each.samples for each in expected], axis=0))
    np.testing.assert_allclose(whole.reference, np.mean([each.reference for each in expected], axis=0))
    assert whole.bias == pytest.approx(np.mean([each.bias for each in expected]))
    # The terms are of the same images, so that their errors do not average out.
    assert whole.stderr > np.sqrt(sum(each.stderr**2 for each in expected)) / 6


def test_errors_and_bias_are_those_of_new_draws() -> None:
    """Of the mean of distances in two networks that see the same images."""
    bases = [np.random.default_rng(number).normal(size=(6, 3)) for number in range(2)]

    def seen(rows: Rows) -> list[Rows]:
        return [(rows @ basis).astype(np.float32) for basis in bases]

    def mean_distance(x: Rows, y: Rows) -> float:
        return float(np.mean([frechet_distance(a, b) for a, b in zip(seen(x), seen(y), strict=True)]))

    values, errors, biases = [], [], []
    for seed in range(120):
        x, y = images(2 * seed, 60), images(2 * seed + 1, 50, shift=0.2)
        whole = mean_influence(
            [
                frechet_influence(Cloud.of(a), Cloud.of(b), no_reference="", device=torch.device("cpu"))
                for a, b in zip(seen(x), seen(y), strict=True)
            ]
        )
        values.append(mean_distance(x, y))
        errors.append(whole.stderr)
        biases.append(whole.bias)
    assert 0.85 < np.sqrt(np.mean(np.square(errors))) / np.std(values) < 1.2
    truth = mean_distance(images(900, 100_000), images(901, 100_000, shift=0.2))
    noise = np.std(values) / np.sqrt(len(values))
    assert np.mean(values) - truth > 6 * noise
    assert abs(np.mean(values) - np.mean(biases) - truth) < 3 * noise
    print(
        np.sqrt(np.mean(np.square(errors))) / np.std(values),
        (np.mean(values) - truth) / noise,
        (np.mean(values) - np.mean(biases) - truth) / noise,
    )


def test_balanced_classes_count_and_statistics_are_exact() -> None:
    labels = np.repeat(np.arange(3), 100)
    rows = images(1, shift=0.2) + 2 * labels[:, None].astype(np.float32)
    plain: Any = influence_of(METRIC, side(images(0)), side(rows), CPU)
    balanced: Any = influence_of(METRIC, side(images(0)), side(rows, labels=labels), CPU)
    assert balanced["fdr6"].classes is not None
    assert balanced["fdr6"].stderr < plain["fdr6"].stderr
    known = side(images(0), as_gaussian=("inception",))
    found: Any = influence_of(METRIC, known, side(rows), CPU)
    assert found["fdr6"].reference is None
    assert "mean and covariance are used" in found["fdr6"].no_reference
    assert found["fdr_clip"].reference is not None
    assert found["fdr6"].stderr == found["fdr6"].stderr_sampling


def test_a_network_that_is_missing_is_named() -> None:
    whole = side(images(0))
    part = replace(whole, networks={k: v for k, v in whole.networks.items() if k != "mae_vitl16"})
    with pytest.raises(UndefinedMetricError, match="mae_vitl16"):
        METRIC(whole, part, CPU)


def test_terms_and_scores_belong_together() -> None:
    with pytest.raises(InputError, match="FDr6 of 5 terms and 7 scores"):
        FDr6(terms=METRIC.terms[1:])
    with pytest.raises(InputError, match="above 0"):
        FDr6(terms=(replace(METRIC.terms[0], validation=0.0), *METRIC.terms[1:]))
