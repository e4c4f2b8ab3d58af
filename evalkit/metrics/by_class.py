"""Scores within classes: Fréchet distance, precision and recall of each class, and their means.

A generator can match a dataset as a whole and fail in some of its classes. Each class is compared with the
reference's images of that class alone; the score is the mean over classes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from evalkit.deviations import HalfSplit, Influence
from evalkit.errors import UndefinedMetricError
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import check_sides, labels_of, parameters
from evalkit.metrics.frechet import frechet_distance, is_rank_deficient
from evalkit.metrics.frechet_influence import Cloud, Transport
from evalkit.metrics.halves import REPLICATES, scores_of_halves
from evalkit.metrics.on_rows import OnRows
from evalkit.metrics.precision_recall import precision_recall
from evalkit.results import Score, ScoreSpec
from evalkit.system.devices import float64_device
from evalkit.system.run import Run

__all__ = ["ClassFrechet", "ClassPrecisionRecall", "WithinClasses", "class_distance", "class_influence"]

Rows = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Of fewer images, influence values leave out too much: with two, errors came out at 0.8 times the true ones.
_LEAST_FOR_INFLUENCE = 3

# Halves of fewer images than this are too unlike the whole: errors were 0.6 to 1.8 times the true ones.
_LEAST_FOR_HALVES = 20


class _Class(NamedTuple):
    """Which images are of one class.

    Attributes:
        label: The class.
        reference: (n,) indices into the rows of the reference.
        samples: (m,) of the samples.
    """

    label: int
    reference: NDArray[np.int64]
    samples: NDArray[np.int64]


class _Classes(NamedTuple):
    """The images of both sides by class.

    Attributes:
        found: The classes that have enough images on both sides, by label.
        left_out: Number of other classes, of either side.
        reference: (n,) label of each image of the reference.
        samples: (m,) of each sample.
    """

    found: Sequence[_Class]
    left_out: int
    reference: NDArray[np.int64]
    samples: NDArray[np.int64]


class WithinClasses(OnRows, ABC):
    """Scores that are means over classes; both sides need labels."""

    needs_labels: ClassVar[bool] = True

    @property
    @abstractmethod
    def least(self) -> int:
        """Images of a class that each side needs."""

    @abstractmethod
    def within(self, reference: Rows, samples: Rows, device: str) -> Sequence[float]:
        """The scores of the images of one class.

        Raises:
            FeatureError: The sides do not fit together.
        """

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """Its scores: the mean over classes, its standard deviation over them, and the value of each.

        Classes with fewer than `least` images on a side are left out, and counted in the parameters.

        Raises:
            UndefinedMetricError: A side has no such features or no labels, or no class has enough images.
            FeatureError: The sides do not fit together.
        """
        r, s = reference.rows(self.output), samples.rows(self.output)
        classes, report = self._classes(reference, samples), self.report(run)
        values = np.empty((len(classes.found), len(self.scores)))
        for number, each in enumerate(classes.found):
            values[number] = self.within(r[each.reference], s[each.samples], run.device)
            report(number + 1, len(values))
        recorded = parameters(self) | self._counts(classes)
        labels = [str(each.label) for each in classes.found]
        return tuple(
            Score(
                name=spec.name,
                value=float(column.mean()),
                std=float(column.std()),
                parameters=recorded,
                by_class=dict(zip(labels, column.tolist(), strict=True)),
            )
            for spec, column in zip(self.scores, values.T, strict=True)
        )

    def _classes(self, reference: BatchFeatures, samples: BatchFeatures) -> _Classes:
        labels = [labels_of(side, self.output) for side in (reference, samples)]
        by_label = [_by_label(each) for each in labels]
        both = sorted({*by_label[0]} & {*by_label[1]})
        every = [_Class(label, *(side[label] for side in by_label)) for label in both]
        found = [each for each in every if min(map(len, each[1:])) >= self.least]
        if not found:
            raise UndefinedMetricError(
                f"none of the {len(both):,} classes that {reference.name} and {samples.name} have in common "
                f"has {self.least} images on each side; give more images of each class, with the same labels "
                "on both sides"
            )
        return _Classes(found, len({*by_label[0]} | {*by_label[1]}) - len(found), *labels)

    def _counts(self, classes: _Classes) -> dict[str, Any]:
        """For the record: how many classes the mean is of, and of how many images each."""
        sizes = np.array([[len(each.reference), len(each.samples)] for each in classes.found])
        least, most = sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()
        return {
            "classes": len(sizes),
            "left_out": classes.left_out,
            "least_images": self.least,
            "reference_images": [least[0], most[0]],
            "sample_images": [least[1], most[1]],
        }


def _by_label(labels: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """Indices of the images of each class."""
    found, counts = np.unique(labels, return_counts=True)
    parts = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    return dict(zip(found.tolist(), parts, strict=True))


def _check_sizes(classes: _Classes, least: int) -> None:
    """Raise an UndefinedMetricError for a class with too few images for a standard error."""
    smallest = min(classes.found, key=lambda each: min(map(len, each[1:])))
    count = min(map(len, smallest[1:]))
    if count < least:
        raise UndefinedMetricError(
            f"class {smallest.label} has only {count} images on a side; give at least {least} of each class"
        )


# Fréchet distance ------------------------------------------------------------------------------------------


class _Thin(NamedTuple):
    """Both sides of a class, where one of them has no more images than features.

    With F the centred rows over ``sqrt(n - 1)``, a covariance is ``F^T F``, and the trace of the root of the
    product of two is the sum of the singular values of ``F_a F_b^T``: a matrix of images by images, which
    takes neither a covariance nor its eigenvalues.

    Attributes:
        shift: (d,) mean of the samples minus that of the reference.
        reference: (n, d) its F.
        samples: (m, d) its F.
    """

    shift: Doubles
    reference: Doubles
    samples: Doubles

    @classmethod
    def of(cls, reference: Rows, samples: Rows) -> _Thin:
        """Of the rows."""
        means = [side.mean(axis=0, dtype=np.float64) for side in (reference, samples)]
        factors = [
            (side - mean) / np.sqrt(len(side) - 1)
            for side, mean in zip((reference, samples), means, strict=True)
        ]
        return cls(means[1] - means[0], *factors)


def class_distance(reference: Rows, samples: Rows) -> float:
    """The Fréchet distance of few images; see :func:`~evalkit.metrics.frechet.frechet_distance`.

    Args:
        reference: (n, d) float features of one class.
        samples: (m, d) likewise.

    Raises:
        FeatureError: Feature dimensions differ, or values are not finite.
        UndefinedMetricError: Fewer than two rows.
    """
    check_sides(reference, samples, "the Fréchet distance within a class")
    if not _is_thin(reference, samples):
        return frechet_distance(reference, samples)
    thin = _Thin.of(reference, samples)
    traces = np.vdot(thin.reference, thin.reference) + np.vdot(thin.samples, thin.samples)
    roots = linalg.svdvals(thin.samples @ thin.reference.T).sum()
    return max(float(thin.shift @ thin.shift + traces - 2 * roots), 0.0)


def class_influence(reference: Rows, samples: Rows, *, device: str = "cpu") -> tuple[Doubles, Doubles]:
    """Influence values of :func:`class_distance`: (n,) of the reference, (m,) of the samples.

    With the singular vectors ``F_a F_b^T = U diag(s) V^T``, the derivative in the weight of image i of side a
    is ``2 (x_i - mean_a).(mean_a - mean_b) + n (|F_i|^2 - sum_k U_ik^2 s_k)``, less its mean: that of
    :mod:`evalkit.metrics.frechet_influence`, which needs regular covariances, at those of fewer images.

    Args:
        reference: (n, d) finite features of one class.
        samples: (m, d) likewise.
        device: torch device of large products, with more images than features.

    Raises:
        UndefinedMetricError: There are more images than features, and a covariance is singular.
    """
    if not _is_thin(reference, samples):
        transport = Transport(Cloud.of(reference), Cloud.of(samples))
        target = float64_device(device)
        return transport.of_reference(target)[0], transport.of_samples(target)[0]
    thin = _Thin.of(reference, samples)
    u, roots, vt = linalg.svd(thin.samples @ thin.reference.T, full_matrices=False)
    return _influence(thin.reference, -thin.shift, vt.T, roots), _influence(
        thin.samples, thin.shift, u, roots
    )


def _is_thin(reference: Rows, samples: Rows) -> bool:
    return is_rank_deficient(min(len(reference), len(samples)), samples.shape[1])


def _influence(factor: Doubles, shift: Doubles, vectors: Doubles, roots: Doubles) -> Doubles:
    """(n,) values of a side with this F, whose mean is ``shift`` from that of the other."""
    n = len(factor)
    quadratic = np.square(factor).sum(axis=1) - np.square(vectors) @ roots
    values = 2 * np.sqrt(n - 1) * (factor @ shift) + n * quadratic
    found: Doubles = values - values.mean()
    return found


@dataclass(frozen=True)
class ClassFrechet(WithinClasses):
    """Fréchet distance within classes, in squared feature units: the mean over classes. Lower is better.

    Attributes:
        output: Of which network and output.
        scores: Its name.
    """

    output: str = "inception:pool"
    scores: tuple[ScoreSpec, ...] = (ScoreSpec(name="class_fid", title="Class FID", higher_is_better=False),)

    @property
    def least(self) -> int:
        """A covariance is of two images or more."""
        return 2

    def within(self, reference: Rows, samples: Rows, device: str) -> tuple[float]:
        """See :func:`class_distance`."""
        del device  # a matrix of images by images
        return (class_distance(reference, samples),)

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, Influence]:
        """Influence values of the score; only the variance within classes counts.

        Raises:
            UndefinedMetricError: As for the score, or a class has fewer than three images on a side, or a
                covariance of more images than features is singular.
        """
        r, s = reference.rows(self.output), samples.rows(self.output)
        classes = self._classes(reference, samples)
        _check_sizes(classes, _LEAST_FOR_INFLUENCE)
        of_reference, of_samples = np.zeros(len(r)), np.zeros(len(s))
        for each in classes.found:
            found = class_influence(r[each.reference], s[each.samples], device=run.device)
            # The score is a mean over classes, and influence values are of weights among all images.
            for whole, own, values in zip((of_reference, of_samples), each[1:], found, strict=True):
                whole[own] = values * (len(whole) / (len(classes.found) * len(own)))
        influence = Influence(
            images=len(s),
            samples=of_samples,
            reference=of_reference,
            no_bias="the bias of distances within classes is not known",
            classes=classes.samples,
            reference_classes=classes.reference,
        )
        return {self.scores[0].name: influence}


# Precision and recall --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassPrecisionRecall(WithinClasses):
    """Improved precision and recall within classes: the means over classes. Higher is better.

    See :func:`~evalkit.metrics.precision_recall.precision_recall`, in exact arithmetic.

    Attributes:
        output: Of which network and output.
        k: The radius of a ball reaches to this nearest neighbour in the class.
        scores: Their names.
    """

    output: str = "inception:pool"
    k: int = 3
    scores: tuple[ScoreSpec, ...] = (
        ScoreSpec(name="class_precision", title="Class precision", higher_is_better=True),
        ScoreSpec(name="class_recall", title="Class recall", higher_is_better=True),
    )

    @property
    def least(self) -> int:
        """An image and its k neighbours."""
        return self.k + 1

    def within(self, reference: Rows, samples: Rows, device: str) -> tuple[float, float]:
        """See :func:`~evalkit.metrics.precision_recall.precision_recall`."""
        return precision_recall(reference, samples, k=self.k, device=device)

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, HalfSplit]:
        """Its scores of halves of every class.

        The standard error is the spread of the scores of halves around their mean. Complementary halves,
        which :mod:`evalkit.metrics.halves` subtracts, have in common what varies alike in both, and in
        classes of 50 images that is up to half of the variance.

        Raises:
            UndefinedMetricError: As for the score, or a class has fewer than 20 images on a side, or its
                halves too few for k neighbours.
        """
        r, s = reference.rows(self.output), samples.rows(self.output)
        classes = self._classes(reference, samples)
        _check_sizes(classes, max(_LEAST_FOR_HALVES, 2 * (self.k + 1)))
        means = np.zeros((len(self.scores), 2, 2, REPLICATES))
        for each in classes.found:
            rows, device = (r[each.reference], s[each.samples]), float64_device(run.device)
            halves = np.array(scores_of_halves(*rows, k=self.k, device=device))
            halves -= halves.mean(axis=(1, 2, 3), keepdims=True)
            # Classes of one size are halved alike; with signs of their own, they do not deviate together.
            signs = np.random.default_rng(each.label % 2**64).choice([-1.0, 1.0], REPLICATES)
            means += signs * halves / len(classes.found)
        digest = hashlib.sha256(classes.samples.tobytes()).hexdigest()[:16]
        return {
            spec.name: HalfSplit(
                images=len(s),
                samples=np.concatenate(mean[0] - mean[1]),
                reference=np.concatenate(mean[:, 0] - mean[:, 1]),
                both=2 * mean.ravel(),
                no_bias=f"the bias of {spec.title.lower()} is not known",
                halves=f"within classes {digest}",
            )
            for spec, mean in zip(self.scores, means, strict=True)
        }
