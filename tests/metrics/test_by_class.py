"""Scores within classes: against formulas written out, derivatives, replicated draws and scores of halves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from halved import in_second
from scipy import linalg
from stand_ins import NO_STORE, batch

from evalkit.comparison import compare
from evalkit.deviations import Influence
from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.features.record import Features
from evalkit.metrics import by_class, named
from evalkit.metrics.by_class import ClassFrechet, ClassPrecisionRecall, class_distance, class_influence
from evalkit.metrics.frechet import frechet_distance
from evalkit.metrics.frechet_influence import Cloud, frechet_influence
from evalkit.metrics.halves import REPLICATES


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny products: waking threads for each would take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(n, seed, d=24, scale=1.0, offset=0.0):
    rng = np.random.default_rng(seed)
    spread = np.arange(1, d + 1) ** -0.6
    found = np.maximum(rng.normal(size=(n, d)) + 0.4, 0) * spread * scale + offset
    return found.astype(np.float32)


def labelled(pool, labels):
    found = batch(pool=pool).networks["inception"]
    return replace(batch(), networks={"inception": replace(found, labels=np.asarray(labels))})


def sides(sizes_r, sizes_s, seed=0, **samples):
    """Both sides with so many images of classes 0, 1 and so on, in random order."""
    made = []
    for number, (sizes, how) in enumerate(((sizes_r, {}), (sizes_s, samples))):
        labels = np.random.default_rng(seed + number).permutation(np.repeat(np.arange(len(sizes)), sizes))
        made.append(labelled(rows(len(labels), seed + 50 + number, **how), labels))
    return made


def of_class(side, label):
    features = side.networks["inception"]
    return features.arrays["pool"][features.labels == label]


# Fréchet distance ------------------------------------------------------------------------------------------


def written_out(x, y):
    """With both covariances, and all eigenvalues of their product."""
    a, b = np.cov(x.T.astype(np.float64)), np.cov(y.T.astype(np.float64))
    shift = x.mean(axis=0, dtype=np.float64) - y.mean(axis=0, dtype=np.float64)
    roots = np.sqrt(np.maximum(linalg.eigvals(a @ b).real, 0)).sum()
    return shift @ shift + np.trace(a) + np.trace(b) - 2 * roots


@pytest.mark.parametrize(
    ("m", "n", "d"),
    [(50, 50, 2048), (5, 9, 64), (2, 2, 8), (40, 7, 20), (7, 40, 20), (40, 50, 12), (20, 21, 20)],
)
def test_it_is_the_frechet_distance(m, n, d):
    r, s = rows(m, 0, d), rows(n, 1, d, scale=1.2, offset=0.1)
    found = class_distance(r, s)
    assert found == pytest.approx(frechet_distance(r, s), rel=1e-9)
    if d < 100:
        assert found == pytest.approx(written_out(r, s), rel=1e-5)
    assert class_distance(r, r) == pytest.approx(0, abs=1e-12 * float(np.square(r).sum()))


def weighted(x, y, v, w):
    """The distance with weights, from the singular values of a matrix of images by images."""
    factors, means = [], []
    for rows_, weights in ((x, v), (y, w)):
        means.append(weights @ rows_)
        centred = (rows_ - means[-1]) * np.sqrt(weights / (1 - weights @ weights))[:, None]
        factors.append(centred)
    traces = sum(np.vdot(each, each) for each in factors)
    shift = means[0] - means[1]
    return shift @ shift + traces - 2 * linalg.svdvals(factors[0] @ factors[1].T).sum()


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (7, 7), (6, 30)])
def test_influence_is_the_derivative(m, n):
    r, s = rows(m, 0).astype(np.float64), rows(n, 1, offset=0.2).astype(np.float64)
    of_reference, of_samples = class_influence(r, s)
    even_r, even_s = np.full(m, 1 / m), np.full(n, 1 / n)
    assert weighted(r, s, even_r, even_s) == pytest.approx(class_distance(r, s), rel=1e-12)
    step = 1e-6
    for i in range(6):
        direction = step * (np.eye(n)[i] - even_s)
        slope = weighted(r, s, even_r, even_s + direction) - weighted(r, s, even_r, even_s - direction)
        assert of_samples[i] == pytest.approx(slope / (2 * step), rel=1e-5, abs=1e-5)
        direction = step * (np.eye(m)[i] - even_r)
        slope = weighted(r, s, even_r + direction, even_s) - weighted(r, s, even_r - direction, even_s)
        assert of_reference[i] == pytest.approx(slope / (2 * step), rel=1e-5, abs=1e-5)


def test_influence_of_few_and_of_many_images_is_the_same_formula(monkeypatch):
    r, s = rows(60, 0, 12).astype(np.float64), rows(50, 1, 12, offset=0.2).astype(np.float64)
    many = class_influence(r, s)
    expected = frechet_influence(Cloud.of(r), Cloud.of(s))
    np.testing.assert_array_equal(many[1], expected.samples)
    np.testing.assert_array_equal(many[0], expected.reference)
    monkeypatch.setattr(by_class, "is_rank_deficient", lambda n, d: True)
    few = class_influence(r, s)
    for a, b in zip(few, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())


def test_the_score_is_the_mean_over_classes():
    """Of those with two images on each side; of all others it is said how many."""
    reference, samples = sides([9, 5, 0, 1, 30, 4], [6, 2, 8, 9, 40, 0, 3], scale=1.1)
    (score,) = ClassFrechet()(reference, samples, NO_STORE)
    expected = {
        str(label): frechet_distance(of_class(reference, label), of_class(samples, label))
        for label in (0, 1, 4)
    }
    assert score.by_class == pytest.approx(expected, rel=1e-9)
    assert list(score.by_class) == ["0", "1", "4"]
    assert score.value == pytest.approx(np.mean([*expected.values()]), rel=1e-9)
    assert score.std == pytest.approx(np.std([*expected.values()]), rel=1e-9)
    assert score.parameters == {
        "output": "inception:pool",
        "classes": 3,
        "left_out": 4,
        "least_images": 2,
        "reference_images": [5, 30],
        "sample_images": [2, 40],
    }
    precision, recall = ClassPrecisionRecall()(reference, samples, NO_STORE)
    assert [*precision.by_class] == [*recall.by_class] == ["0", "4"]
    assert (precision.parameters["left_out"], precision.parameters["least_images"]) == (5, 4)


def test_influence_of_the_score_is_the_derivative_of_the_mean():
    """In the weights of images within their classes; images of classes that are left out have none."""
    reference, samples = sides([9, 5, 1], [6, 40, 8], scale=1.1)
    found = ClassFrechet().influence(reference, samples, NO_STORE)["class_fid"]
    assert isinstance(found, Influence)
    for values, side, which in ((found.reference, reference, 0), (found.samples, samples, 1)):
        labels = side.networks["inception"].labels
        for label in (0, 1):
            own = class_influence(of_class(reference, label), of_class(samples, label))[which]
            expected = own * len(labels) / (2 * len(own))
            np.testing.assert_allclose(values[labels == label], expected, rtol=1e-9)
        assert (values[labels == 2] == 0).all()
    variance = sum(
        own.var(ddof=1) / len(own) / 4
        for label in (0, 1)
        for own in class_influence(of_class(reference, label), of_class(samples, label))
    )
    assert found.stderr == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert found.bias is None


@pytest.mark.parametrize(
    ("size_r", "size_s", "offset", "low", "high"),
    [(10, 12, 0.3, 0.9, 1.35), (10, 12, 0.0, 1.0, 1.6), (3, 3, 0.2, 0.9, 1.45), (40, 30, 0.3, 0.9, 1.35)],
)
def test_errors_of_distances_are_those_of_new_draws(size_r, size_s, offset, low, high):
    """Few images for many features. Where both sides are alike, errors are known to be wide."""
    values, errors, given = [], [], []
    for seed in range(120):
        both = sides([size_r] * 5, [size_s] * 5, seed=100 * seed, offset=offset)
        values.append(ClassFrechet()(*both, NO_STORE)[0].value)
        found = ClassFrechet().influence(*both, NO_STORE)["class_fid"]
        errors.append(found.stderr)
        given.append(found.stderr_sampling)
    assert low < np.sqrt(np.mean(np.square(errors))) / np.std(values) < high
    assert np.mean(given) < np.mean(errors)


# Precision and recall --------------------------------------------------------------------------------------


def by_definition(r, s, k=3):
    """Shares of each side in the balls of the other, all distances in float64."""
    r, s = r.astype(np.float64), s.astype(np.float64)

    def distances(a, b):
        return np.square(a[:, None] - b).sum(axis=2)

    radii = [np.sort(distances(each, each), axis=1)[:, k] for each in (r, s)]
    across = distances(r, s)
    return (across <= radii[0][:, None]).any(axis=0).mean(), (across <= radii[1]).any(axis=1).mean()


def test_precision_and_recall_are_those_within_classes():
    reference, samples = sides([9, 25, 30, 2], [14, 60, 8, 9], scale=1.2, offset=0.05)
    found = ClassPrecisionRecall(k=4)(reference, samples, NO_STORE)
    expected = np.array(
        [by_definition(of_class(reference, label), of_class(samples, label), 4) for label in (0, 1, 2)]
    )
    for score, values in zip(found, expected.T, strict=True):
        assert score.by_class == dict(zip("012", values.tolist(), strict=True))
        assert (score.value, score.std) == (pytest.approx(values.mean()), pytest.approx(values.std()))
        assert score.std > 0
    assert found[0].parameters["k"] == 4


def test_errors_are_of_scores_of_halves():
    """Of one class: the spread of the scores, and the differences between complementary halves."""
    reference, samples = sides([21], [24], scale=1.2, offset=0.05)
    r, s = of_class(reference, 0), of_class(samples, 0)
    second_r, second_s = (in_second(len(each), seed)[1] for each, seed in ((r, 1), (s, 2)))
    scores = np.array(
        [
            [
                [by_definition(r[second_r[:, b] == j], s[second_s[:, b] == i]) for b in range(REPLICATES)]
                for j in (0, 1)
            ]
            for i in (0, 1)
        ]
    )
    found = ClassPrecisionRecall().influence(reference, samples, NO_STORE)
    for each, t in zip(found.values(), np.moveaxis(scores, -1, 0), strict=True):
        assert each.stderr == pytest.approx(t.std(), rel=1e-9)
        of_samples, of_reference = np.square(t[0] - t[1]).mean() / 4, np.square(t[:, 0] - t[:, 1]).mean() / 4
        assert each.stderr_sampling == pytest.approx(np.sqrt(of_samples), rel=1e-9)
        assert each.stderr_reference == pytest.approx(np.sqrt(of_reference), rel=1e-9)
        assert (each.images, each.bias) == (24, None)


def test_classes_do_not_deviate_together():
    """Four classes of the same images: as if of others, the error of the mean is half that of one."""
    reference, samples = sides([24], [26], scale=1.2, offset=0.05)
    one = ClassPrecisionRecall().influence(reference, samples, NO_STORE)
    r, s = of_class(reference, 0), of_class(samples, 0)
    many = ClassPrecisionRecall().influence(
        labelled(np.tile(r, (4, 1)), np.repeat(np.arange(-2, 2), len(r))),
        labelled(np.tile(s, (4, 1)), np.repeat(np.arange(-2, 2), len(s))),
        NO_STORE,
    )
    for name, each in many.items():
        assert each.stderr == pytest.approx(one[name].stderr / 2, rel=0.15)


def test_errors_of_precision_and_recall_are_those_of_new_draws():
    """Of classes of 50 images, of which two in five have not all modes."""
    centres = 1.5 * np.random.default_rng(0).normal(size=(4, 8))

    def draw(rng, classes, modes, offset):
        labels = np.repeat(np.arange(classes), 50)
        pool = rng.normal(size=(len(labels), 8)) + centres[rng.integers(0, modes, len(labels))] + offset
        return pool.astype(np.float32), labels

    rng = np.random.default_rng(1)
    drawn = [(draw(rng, 1, 4, 0.0)[0], draw(rng, 1, 3, 0.2)[0]) for _ in range(400)]
    truth = np.std([by_definition(r, s) for r, s in drawn], axis=0) / np.sqrt(20)
    found = ClassPrecisionRecall().influence(
        labelled(*draw(rng, 20, 4, 0.0)), labelled(*draw(rng, 20, 3, 0.2)), NO_STORE
    )
    for each, expected in zip(found.values(), truth, strict=True):
        assert 0.8 < each.stderr / expected < 1.35


# Both ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [ClassFrechet(), ClassPrecisionRecall()])
def test_two_sets_of_the_same_classes_can_be_paired(metric):
    reference, samples = sides([20, 25, 30], [22, 24, 20], scale=1.2)
    other = labelled(rows(66, 7, scale=1.3), samples.networks["inception"].labels)
    first, second = (metric.influence(reference, each, NO_STORE) for each in (samples, other))
    for name, each in first.items():
        assert each.variance_of_difference(each, paired=True) == 0
        assert each.variance_of_difference(second[name], paired=True) > 0
    shuffled = labelled(other.networks["inception"].arrays["pool"], np.repeat([0, 1, 2], 22))
    for name, each in metric.influence(reference, shuffled, NO_STORE).items():
        with pytest.raises(InputError, match="cannot be paired"):
            each.variance_of_difference(first[name], paired=True)


def test_what_has_no_value_is_refused():
    good, _ = sides([20, 20], [20, 20])
    with pytest.raises(UndefinedMetricError, match=r"batch has no labels; .* give images with labels"):
        ClassFrechet()(good, batch(pool=rows(40, 0)), NO_STORE)
    few = labelled(rows(10, 0), np.arange(40) % 2)
    with pytest.raises(UndefinedMetricError, match="labels of 40 images, and features of 10 of these"):
        ClassFrechet()(good, few, NO_STORE)
    others = labelled(rows(40, 0), np.arange(40) % 2 + 7)
    with pytest.raises(UndefinedMetricError, match="none of the 0 classes that batch and batch have"):
        ClassFrechet()(good, others, NO_STORE)
    single = labelled(rows(4, 0), [0, 1, 2, 3])
    with pytest.raises(UndefinedMetricError, match=r"none of the 2 classes .* has 4 images on each side"):
        ClassPrecisionRecall()(good, single, NO_STORE)
    with pytest.raises(FeatureError, match="dimensions"):
        ClassFrechet()(good, labelled(rows(40, 0, 30), np.arange(40) % 2), NO_STORE)
    with pytest.raises(InputError, match="k is 0"):
        ClassPrecisionRecall(k=0)(good, good, NO_STORE)


def test_of_too_few_images_there_is_no_error():
    reference, samples = sides([20, 20], [2, 20])
    with pytest.raises(UndefinedMetricError, match="class 0 has only 2 images on a side; give at least 3"):
        ClassFrechet().influence(reference, samples, NO_STORE)
    reference, samples = sides([20, 19], [20, 20])
    with pytest.raises(UndefinedMetricError, match="class 1 has only 19 images on a side; give at least 20"):
        ClassPrecisionRecall().influence(reference, samples, NO_STORE)
    with pytest.raises(UndefinedMetricError, match="give at least 24"):
        ClassPrecisionRecall(k=11).influence(reference, samples, NO_STORE)


def test_missing_labels_are_noticed_before_the_work(images, monkeypatch):
    monkeypatch.setattr("evalkit.comparison.make_extractors", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UndefinedMetricError, match=r"<array> has no labels; .* need the class of every"):
        compare(images, images, metrics="class_fid", store=None)


def test_any_network_will_do():
    metric = named("class_precision_recall@dinov2_vitl14")
    assert metric.needs == {"dinov2_vitl14:class_token": "rows"}
    assert [spec.name for spec in metric.scores] == [
        "class_precision@dinov2_vitl14",
        "class_recall@dinov2_vitl14",
    ]


def test_features_files_keep_labels(tmp_path):
    reference, samples = sides([9, 9], [8, 8])
    paths = []
    for name, side in (("r.h5", reference), ("s.h5", samples)):
        paths.append(tmp_path / name)
        side.networks["inception"].save(paths[-1])
    assert Features.load(paths[0]).labels is not None
    found = compare(*paths, metrics="class_fid", store=None)
    assert found.score("class_fid").by_class == ClassFrechet()(reference, samples, NO_STORE)[0].by_class
