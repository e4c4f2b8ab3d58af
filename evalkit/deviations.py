"""How a score deviates when its samples or its reference are drawn again: the base of all error bars.

By influence values where a score has them (:class:`Influence`), by halves of the images where it has none
(:class:`HalfSplit`). This is the error of drawing images. Training again, another seed or another checkpoint
vary more; see :func:`evalkit.uncertainty.runs_of_one_setting`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, UndefinedMetricError

__all__ = ["Deviations", "Excess", "HalfSplit", "Influence", "balanced_classes"]

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Deviations(ABC):
    """How one score deviates when its samples, or its reference, are drawn again.

    Attributes:
        images: Number of samples.
        samples: Deviations that the samples cause.
        reference: Deviations that the reference causes; None where that cannot be said.
        no_reference: Why there are none, for the user; empty if the score does not look at the reference.
        bias: What the value exceeds that of infinitely many images by, on average; None where not known.
        no_bias: Why it is not known, for the user.
    """

    images: int
    samples: Floats
    reference: Floats | None = None
    no_reference: str = ""
    bias: float | None = None
    no_bias: str = ""

    @property
    @abstractmethod
    def stderr_sampling(self) -> float:
        """Standard error from the draw of the samples, the reference being given."""

    @property
    @abstractmethod
    def stderr_reference(self) -> float | None:
        """Standard error from the draw of the reference, the samples being given; None where not known.

        All scores against this reference have it in common.
        """

    @property
    @abstractmethod
    def stderr(self) -> float:
        """Standard error from the draw of both; of the samples alone where the reference's is not known."""

    @abstractmethod
    def variance_of_difference(self, other: Deviations, *, paired: bool) -> float:
        """Variance of this score minus ``other``, both against the same reference.

        Args:
            other: The same score of other samples.
            paired: The images of the same index are of the same noise and class.

        Raises:
            InputError: They are to be paired, and differ in their number or their classes; or they are
                deviations of different kinds, or against different references.
        """

    @abstractmethod
    def given_reference(self) -> Self:
        """What the samples alone cause: the same with a reference that is taken to be exact."""


def _check_comparable(first: Deviations, second: Deviations, *, paired: bool, alike: bool) -> None:
    if type(first) is not type(second):
        raise InputError("deviations of different scores cannot be compared; give the same score of both")
    if paired and not alike:
        raise InputError(
            f"samples of {first.images} and of {second.images} images cannot be paired: their numbers or "
            "their classes differ; compare them unpaired"
        )
    if (
        first.reference is not None
        and second.reference is not None
        and len(first.reference) != len(second.reference)
    ):
        raise InputError("the two scores are against different references; give both the same one")


class Excess(NamedTuple):
    """Variance that influence values count too much, from the second order of a score.

    Of a score ``theta + mean psi_i + mean phi_ij + ...``, the second order has the variance
    ``2 E phi^2 / n^2``, and estimated influence values count it twice (it follows from Hoeffding 1948). It
    matters where samples and reference are nearly alike, so that the first order vanishes.

    Attributes:
        sampling: ``2 E phi^2 / n^2`` for pairs of samples.
        reference: The same for pairs of the reference.
        joint: ``E phi^2 / (n m)`` for a sample and an image of the reference: both influences count it.
    """

    sampling: float = 0.0
    reference: float = 0.0
    joint: float = 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Influence(Deviations):
    """Influence values: how the score moves as the weight of one image grows (Hampel 1974).

    For a score F of samples with weights w, all 1/n, value i is the derivative of F along ``delta_i - w``.
    The values have mean zero, and ``Var F = var(values) / n`` (von Mises 1947; for Fréchet distances
    arXiv:1507.04090). A finite reference adds the same of its own images.

    Attributes:
        samples: (n,) values of the samples.
        reference: (m,) values of the reference's images.
        classes: (n,) class of each sample, where every class has a fixed number of samples: then only the
            variance within classes counts. See :func:`balanced_classes`.
        reference_classes: (m,) the same of the reference.
        excess: What the values count too much; of pairs within classes, where there are classes.
    """

    classes: Labels | None = None
    reference_classes: Labels | None = None
    excess: Excess = field(default_factory=Excess)

    @property
    def stderr_sampling(self) -> float:
        """See :class:`Deviations`."""
        return math.sqrt(_without(self._of_samples, self.excess.sampling))

    @property
    def stderr_reference(self) -> float | None:
        """See :class:`Deviations`."""
        if self.reference is None:
            return None
        return math.sqrt(_without(self._of_reference, self.excess.reference))

    @property
    def stderr(self) -> float:
        """See :class:`Deviations`."""
        if self.reference is None:
            return self.stderr_sampling
        return math.sqrt(_without(self._of_samples + self._of_reference, sum(self.excess)))

    def variance_of_difference(self, other: Deviations, *, paired: bool) -> float:
        """See :class:`Deviations`. What the reference causes in both alike cancels."""
        alike = isinstance(other, Influence) and self._has_classes_of(other)
        _check_comparable(self, other, paired=paired, alike=alike)
        assert isinstance(other, Influence)
        if paired:
            # Of pairs of differences the excess is not known, and little where they are small.
            variance, excess = _variance_of_mean(self.samples - other.samples, self.classes), 0.0
        else:
            variance = self._of_samples + other._of_samples
            excess = self.excess.sampling + other.excess.sampling
        if self.reference is not None and other.reference is not None:
            variance += _variance_of_mean(self.reference - other.reference, self.reference_classes)
            excess += 0.0 if paired else self.excess.joint + other.excess.joint
        return _without(variance, excess)

    def given_reference(self) -> Self:
        """See :class:`Deviations`."""
        return replace(self, reference=None, excess=Excess(self.excess.sampling))

    @property
    def _of_samples(self) -> float:
        return _variance_of_mean(self.samples, self.classes)

    @property
    def _of_reference(self) -> float:
        return 0.0 if self.reference is None else _variance_of_mean(self.reference, self.reference_classes)

    def costliest(
        self, count: int, *, higher_is_better: bool, of_reference: bool = False
    ) -> NDArray[np.int64]:
        """Indices of the ``count`` images that make the score worst, the worst first.

        Args:
            count: How many; all if there are fewer.
            higher_is_better: Of the score: the worst have negative values then.
            of_reference: Of the reference, the images that the samples cover least; else of the samples.

        Raises:
            UndefinedMetricError: The reference has no influence values.
        """
        values = self.reference if of_reference else self.samples
        if values is None:
            raise UndefinedMetricError(self.no_reference or "this score does not look at the reference")
        harm = -values if higher_is_better else values
        return np.argsort(-harm, kind="stable")[:count]

    def _has_classes_of(self, other: Influence) -> bool:
        if self.classes is None or other.classes is None:
            return self.classes is other.classes and self.images == other.images
        return np.array_equal(self.classes, other.classes)


@dataclass(frozen=True, eq=False, kw_only=True)
class HalfSplit(Deviations):
    """Differences between halves, for scores that have no influence values.

    Every replicate halves both sides at random. A score of halves has twice the variance, and halves of a
    side share no image. So for two scores t of halves, of different halves of the samples, of the reference,
    or of both, ``mean((t_1 - t_2)^2) / 4`` is the variance of the score that the samples cause, that the
    reference causes, or both (McCarthy 1969, "Pseudo-replication: Half Samples"). The last is less than the
    sum of the first two, where a point's nearest neighbours decide: what samples and reference cause jointly
    is in both.

    Attributes:
        samples: (replicates,) differences of scores of the two halves of the samples.
        reference: (replicates,) of the two halves of the reference.
        both: (replicates,) of different halves of both.
        halves: Of the samples; sides with the same text are halved alike, and can be paired.
    """

    both: Floats
    halves: str

    @property
    def stderr_sampling(self) -> float:
        """See :class:`Deviations`."""
        return math.sqrt(_variance_of_halves(self.samples))

    @property
    def stderr_reference(self) -> float | None:
        """See :class:`Deviations`."""
        return None if self.reference is None else math.sqrt(_variance_of_halves(self.reference))

    @property
    def stderr(self) -> float:
        """See :class:`Deviations`."""
        return math.sqrt(_variance_of_halves(self.both))

    def variance_of_difference(self, other: Deviations, *, paired: bool) -> float:
        """See :class:`Deviations`.

        The differences between halves are those of the same halves, paired or not: samples that have nothing
        to do with each other do not deviate together.
        """
        alike = isinstance(other, HalfSplit) and self.halves == other.halves
        _check_comparable(self, other, paired=paired, alike=alike)
        assert isinstance(other, HalfSplit)
        return _variance_of_halves(self.both - other.both)

    def given_reference(self) -> Self:
        """See :class:`Deviations`."""
        return replace(self, reference=None, both=self.samples)


def _without(variance: float, excess: float) -> float:
    """Of the variance of influence values, the second order is at most half too much."""
    return max(variance - excess, variance / 2)


def _variance_of_halves(differences: Floats) -> float:
    return float(np.square(differences).mean()) / 4


def _variance_of_mean(values: Floats, classes: Labels | None) -> float:
    """Variance of the mean of ``values``."""
    within = float(values.var(ddof=1)) if classes is None else _variance_within(values, classes)
    return within / len(values)


def _variance_within(values: Floats, classes: Labels) -> float:
    """Mean over the classes of the variance within each: that of a sample of fixed numbers of each class.

    Cochran 1977, "Sampling Techniques", chapter 5, with proportional allocation. A class of one image has
    none: no score of classes counts it.
    """
    _, group, counts = np.unique(classes, return_inverse=True, return_counts=True)
    means = np.bincount(group, values) / counts
    squares = np.bincount(group, np.square(values - means[group]))
    return float((counts / len(values)) @ (squares / np.maximum(counts - 1, 1)))


def balanced_classes(labels: NDArray[Any] | None) -> Labels | None:
    """The labels, if every class has as many images, give or take one, and at least two; else None.

    So a batch was made with fixed numbers of each class. Labels drawn at random are not that even.
    """
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return None
    _, counts = np.unique(labels, return_counts=True)
    if len(counts) < 2 or counts.min() < 2 or counts.max() - counts.min() > 1:
        return None
    return labels.astype(np.int64)
