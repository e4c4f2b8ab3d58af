"""Standard errors of scores, tests of differences between them, and the sample sizes that these need.

Everything follows from how a score deviates when its samples are others: by influence values where a score has
them (:class:`Influence`), by halves of the samples where it has none (:class:`HalfSplit`). This is the error of
drawing samples. Training again, another seed or another checkpoint vary more; see :func:`runs_of_one_setting`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evalkit.errors import InputError, UndefinedMetricError

__all__ = [
    "Deviations",
    "Difference",
    "HalfSplit",
    "Influence",
    "Runs",
    "balanced_classes",
    "detectable_difference",
    "difference",
    "difference_of_runs",
    "holm",
    "required_images",
    "runs_of_one_setting",
]

Floats = NDArray[np.float64]

LEVEL = 0.05
POWER = 0.8


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
    def stderr_sampling(self) -> float:
        """Standard error from the draw of the samples, the reference being given."""
        return math.sqrt(self._variance(self.samples, of_reference=False))

    @property
    def stderr_reference(self) -> float | None:
        """Standard error from the draw of the reference: common to all scores against it. None if unknown."""
        if self.reference is None:
            return None
        return math.sqrt(self._variance(self.reference, of_reference=True))

    @property
    def stderr(self) -> float:
        """Standard error from the draw of both; of the samples alone where the reference's is not known."""
        return math.hypot(self.stderr_sampling, self.stderr_reference or 0.0)

    @abstractmethod
    def _variance(self, deviations: Floats, *, of_reference: bool) -> float:
        """Variance of the score, from deviations of this kind."""

    @abstractmethod
    def _pairs_with(self, other: Deviations) -> bool:
        """Whether the samples have the same number and classes."""

    def variance_of_difference(self, other: Deviations, *, paired: bool) -> float:
        """Variance of this score minus ``other``, both against the same reference.

        Args:
            other: The same score of other samples.
            paired: The images of the same index are of the same noise and class.

        Raises:
            InputError: They are to be paired, and differ in their number or their classes; or they are
                deviations of different kinds, or against different references.
        """
        if type(self) is not type(other):
            raise InputError("deviations of different scores cannot be compared; give the same score of both")
        if paired:
            if not self._pairs_with(other):
                raise InputError(
                    f"samples of {self.images} and of {other.images} images cannot be paired: their numbers or "
                    "their classes differ; compare them unpaired"
                )
            sampling = self._variance(self.samples - other.samples, of_reference=False)
        else:
            sampling = self.stderr_sampling**2 + other.stderr_sampling**2
        if self.reference is None or other.reference is None:
            return sampling
        if len(self.reference) != len(other.reference):
            raise InputError("the two scores are against different references; give both the same one")
        return sampling + self._variance(self.reference - other.reference, of_reference=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class Influence(Deviations):
    """Influence values: how the score moves as the weight of one image grows (Hampel 1974).

    For a score F of samples with weights w, all 1/n, value i is the derivative of F along ``delta_i - w``. The
    values have mean zero, and ``Var F = var(values) / n`` (von Mises 1947; for Fréchet distances
    arXiv:1507.04090). A finite reference adds the same of its own images.

    Attributes:
        samples: (n,) values of the samples.
        reference: (m,) values of the reference's images.
        classes: (n,) class of each sample, where every class has a fixed number of samples: then only the
            variance within classes counts. See :func:`balanced_classes`.
        reference_classes: (m,) the same of the reference.
    """

    classes: NDArray[np.int64] | None = None
    reference_classes: NDArray[np.int64] | None = None

    def costliest(self, count: int, *, higher_is_better: bool) -> NDArray[np.int64]:
        """Indices of the ``count`` samples that make the score worst, the worst first.

        Args:
            count: How many; all if there are fewer.
            higher_is_better: Of the score: the worst have negative values then.
        """
        harm = -self.samples if higher_is_better else self.samples
        return np.argsort(-harm, kind="stable")[:count]

    def _variance(self, deviations: Floats, *, of_reference: bool) -> float:
        classes = self.reference_classes if of_reference else self.classes
        if classes is None:
            return float(deviations.var(ddof=1)) / len(deviations)
        return _variance_within(deviations, classes) / len(deviations)

    def _pairs_with(self, other: Deviations) -> bool:
        assert isinstance(other, Influence)
        if self.images != other.images or (self.classes is None) != (other.classes is None):
            return False
        return self.classes is None or np.array_equal(self.classes, other.classes)


@dataclass(frozen=True, eq=False, kw_only=True)
class HalfSplit(Deviations):
    """Differences between complementary halves, for scores that have no influence values.

    Every replicate halves a side at random. Half as many images have twice the variance, and the halves share
    no image: ``Var F = mean((t_1 - t_2)^2) / 4``, with the score t of each half (McCarthy 1969, "Pseudo-replication:
    Half Samples"). For the samples the reference is whole, and the other way round.

    Attributes:
        samples: (replicates,) ``t_1 - t_2`` with halves of the samples.
        reference: (replicates,) the same with halves of the reference.
        halves: Of the samples; what has the same text has the same halves, and can be paired.
    """

    halves: str

    def _variance(self, deviations: Floats, *, of_reference: bool) -> float:
        del of_reference
        return float(np.square(deviations).mean()) / 4

    def _pairs_with(self, other: Deviations) -> bool:
        assert isinstance(other, HalfSplit)
        return self.halves == other.halves


def _variance_within(values: Floats, classes: NDArray[np.int64]) -> float:
    """Mean over the classes of the variance within each: that of a sample of fixed numbers of each class.

    Cochran 1977, "Sampling Techniques", chapter 5, with proportional allocation.
    """
    _, group, counts = np.unique(classes, return_inverse=True, return_counts=True)
    means = np.bincount(group, values) / counts
    squares = np.bincount(group, np.square(values - means[group]))
    return float((counts / len(values)) @ (squares / (counts - 1)))


def balanced_classes(labels: NDArray[Any] | None) -> NDArray[np.int64] | None:
    """The labels, if every class has the same number of images, give or take one, and at least two; else None.

    So a batch was made with fixed numbers of each class. Labels drawn at random are not that even.
    """
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return None
    _, counts = np.unique(labels, return_counts=True)
    if len(counts) < 2 or counts.min() < 2 or counts.max() - counts.min() > 1:
        return None
    return labels.astype(np.int64)


# Differences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One score of two sets of samples against the same reference.

    Attributes:
        value: The first minus the second.
        stderr: Its standard error.
        z: ``value / stderr``.
        p: Probability of a difference at least as large, in either direction, if there were none.
        paired: Whether the images of the same index were taken to be of the same noise and class.
    """

    value: float
    stderr: float
    z: float
    p: float
    paired: bool = False


def difference(
    first: float, second: float, deviations: Deviations, other: Deviations, *, paired: bool
) -> Difference:
    """Test whether two scores against the same reference differ, by ``z = (F_A - F_B) / SE``.

    As arXiv:1511.04581 does for the kernel distance, for any score. What the reference has in common for both
    cancels. Give the values without bias where both have them: then sets of different sizes can be compared.

    Args:
        first: F_A.
        second: F_B.
        deviations: Of F_A.
        other: Of F_B.
        paired: The images of the same index are of the same noise and class.

    Raises:
        InputError: The deviations do not fit together.
        UndefinedMetricError: The standard error is zero and the difference is not.
    """
    stderr = math.sqrt(deviations.variance_of_difference(other, paired=paired))
    value = first - second
    z = _ratio(value, stderr)
    return Difference(value=value, stderr=stderr, z=z, p=math.erfc(abs(z) / math.sqrt(2)), paired=paired)


def _ratio(value: float, stderr: float) -> float:
    if stderr > 0:
        return value / stderr
    if value == 0:
        return 0.0
    raise UndefinedMetricError(
        f"a difference of {value:.3g} with a standard error of zero cannot be tested; give more images"
    )


def holm(p: Sequence[float]) -> list[float]:
    """Corrects p values for their number: each is at most 5 % only if it stands among all of them.

    The chance that any of several true null hypotheses is rejected stays at the level. Holm 1979, "A Simple
    Sequentially Rejective Multiple Test Procedure".
    """
    corrected = [0.0] * len(p)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda each: p[each])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


# Several runs of one setting -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Runs:
    """One score of several runs of one setting: trainings, seeds or checkpoints.

    Attributes:
        mean: Over the runs.
        stderr: Standard error of the mean, from runs and samples together.
        between: Standard deviation between runs, without that of sampling; None for a single run.
        sampling: Standard deviation of one run from the draw of its samples.
        runs: How many.
    """

    mean: float
    stderr: float
    between: float | None
    sampling: float
    runs: int


def runs_of_one_setting(values: Sequence[float], stderrs: Sequence[float]) -> Runs:
    """The mean over runs, and how much of the spread is between runs and how much is sampling.

    The spread of the values is that of runs and of samples together, so it gives the standard error of the
    mean. What exceeds sampling lies between the runs (nested random effects: Searle, Casella and McCulloch 1992,
    "Variance Components"). Of a single run, sampling alone is known.

    Args:
        values: The score of each run.
        stderrs: The standard error of each from the draw of its samples.

    Raises:
        InputError: There is no run, or not one standard error for each.
    """
    n = len(values)
    if not n or len(stderrs) != n:
        raise InputError(f"{n} values with {len(stderrs)} standard errors; give at least one run, and one for each")
    sampling = float(np.mean(np.square(stderrs)))
    if n == 1:
        return Runs(mean=values[0], stderr=stderrs[0], between=None, sampling=stderrs[0], runs=1)
    spread = float(np.var(values, ddof=1))
    return Runs(
        mean=float(np.mean(values)),
        stderr=math.sqrt(spread / n),
        between=math.sqrt(max(0.0, spread - sampling)),
        sampling=math.sqrt(sampling),
        runs=n,
    )


def difference_of_runs(first: Runs, second: Runs) -> Difference:
    """Test whether two settings differ, from several runs of each (Welch 1947).

    p is of Student's t with the degrees of freedom of Welch and Satterthwaite: a few runs know their own spread
    badly. What z says is the same ratio as in :func:`difference`.

    Raises:
        UndefinedMetricError: A setting has one run, so that its spread is not known; or nothing varies.
    """
    if min(first.runs, second.runs) < 2:
        raise UndefinedMetricError(
            f"{first.runs} and {second.runs} runs: how much runs of a setting differ cannot be told from one; "
            "give at least two of each"
        )
    value = first.mean - second.mean
    parts = [(each.stderr**2, each.runs - 1) for each in (first, second)]
    stderr = math.sqrt(sum(variance for variance, _ in parts))
    z = _ratio(value, stderr)
    if z == 0:
        return Difference(value=value, stderr=stderr, z=z, p=1.0)
    freedom = stderr**4 / sum(variance**2 / free for variance, free in parts)
    return Difference(value=value, stderr=stderr, z=z, p=float(2 * special.stdtr(freedom, -abs(z))))


# How many images -------------------------------------------------------------------------------------------


def _z_of_level_and_power() -> float:
    """Standard errors that a true difference must measure to be found at 5 % with 80 % power: 2.80.

    Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences"; the other direction's chance is
    neglected.
    """
    return float(special.ndtri(1 - LEVEL / 2) + special.ndtri(POWER))


def detectable_difference(stderr: float) -> float:
    """The smallest true difference that shows at 5 % with 80 % power, if a difference has this error."""
    return _z_of_level_and_power() * stderr


def required_images(difference: float, stderr: float, images: int, *, fixed: float = 0.0) -> int:
    """How many images each set needs, so that a true difference shows at 5 % with 80 % power.

    Args:
        difference: To be shown; its sign does not matter.
        stderr: Standard error of a difference between two sets of ``images`` images: for two independent sets
            alike, the square root of 2 times the sampling error of one.
        images: Number of images of each.
        fixed: Standard error of the difference that more samples do not reduce: the reference's part.

    Raises:
        InputError: The difference is zero, or a number is negative or not finite.
        UndefinedMetricError: No number of samples is enough with this reference.
    """
    if not (math.isfinite(difference) and difference and math.isfinite(stderr) and stderr >= 0 and images > 0):
        raise InputError(
            f"difference={difference!r}, stderr={stderr!r}, images={images!r}; expected a difference that is not "
            "zero, a standard error and a number of images"
        )
    allowed = (difference / _z_of_level_and_power()) ** 2 - fixed**2
    if allowed <= 0:
        raise UndefinedMetricError(
            f"a difference of {abs(difference):.3g} does not show with this reference, however many samples "
            f"there are: the reference alone gives a standard error of {fixed:.3g}; give a larger one"
        )
    return max(2, math.ceil(images * stderr**2 / allowed))
