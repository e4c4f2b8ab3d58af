"""Tests of differences between scores, several runs of one setting, and the sample sizes that these need.

All from how scores deviate (:mod:`evalkit.deviations`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from evalkit.deviations import Deviations
from evalkit.errors import InputError, UndefinedMetricError
from evalkit.pairs import LEVEL, Difference, Runs

__all__ = [
    "POWER",
    "detectable_difference",
    "difference",
    "difference_of_runs",
    "holm",
    "required_images",
    "runs_of_one_setting",
]

POWER = 0.8
"""Chance that sample sizes are planned for: that a true difference is found."""


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
    if stderr > 0 and math.isfinite(value / stderr):
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


def runs_of_one_setting(values: Sequence[float], stderrs: Sequence[float] | None) -> Runs:
    """The mean over runs, and how much of the spread is between runs and how much is sampling.

    The spread of the values is that of runs and of samples together, so it gives the standard error of the
    mean; it is at least that of sampling, where this is known. What exceeds sampling lies between the runs
    (nested random effects: Searle, Casella and McCulloch 1992, "Variance Components"). Of a single run,
    sampling alone is known.

    Args:
        values: The score of each run.
        stderrs: The standard error of each from the draw of its samples; None where it is not known.

    Raises:
        InputError: There is no run, or not one standard error for each.
        UndefinedMetricError: There is a single run, without a standard error.
    """
    n = len(values)
    if not n or (stderrs is not None and len(stderrs) != n):
        raise InputError(
            f"{n} values with {len(stderrs or ())} standard errors; give at least one run, and one for each"
        )
    sampling = None if stderrs is None else math.sqrt(float(np.mean(np.square(stderrs))))
    if n == 1:
        if sampling is None:
            raise UndefinedMetricError("how much a single run without a standard error varies is not known")
        return Runs(mean=values[0], stderr=sampling, between=None, sampling=sampling, runs=1)
    spread = float(np.var(values, ddof=1))
    return Runs(
        mean=float(np.mean(values)),
        stderr=math.sqrt(max(spread, (sampling or 0.0) ** 2) / n),
        between=None if sampling is None else math.sqrt(max(0.0, spread - sampling**2)),
        sampling=sampling,
        runs=n,
    )


def difference_of_runs(first: Runs, second: Runs) -> Difference:
    """Test whether two settings differ, from several runs of each (Welch 1947).

    p is of Student's t with the degrees of freedom of Welch and Satterthwaite, because the spread of a few
    runs is not well known. z is the same ratio as in :func:`difference`.

    Raises:
        UndefinedMetricError: A setting has one run, so that its spread is not known; or nothing varies.
    """
    if min(first.runs, second.runs) < 2:
        raise UndefinedMetricError(
            f"{first.runs} and {second.runs} runs: how much runs of a setting differ cannot be told from "
            "one; give at least two of each"
        )
    value = first.mean - second.mean
    parts = [(each.stderr**2, each.runs - 1) for each in (first, second)]
    stderr = math.sqrt(sum(variance for variance, _ in parts))
    try:
        z = _ratio(value, stderr)
    except UndefinedMetricError:
        raise UndefinedMetricError("the runs of each setting have the same score; give more runs") from None
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
        UndefinedMetricError: No number of samples is enough.
    """
    if not (
        math.isfinite(difference) and difference and math.isfinite(stderr) and stderr >= 0 and images > 0
    ):
        raise InputError(
            f"difference={difference!r}, stderr={stderr!r}, images={images!r}; expected a difference that is "
            "not zero, a standard error and a number of images"
        )
    stderr_shown = difference / _z_of_level_and_power()
    allowed = stderr_shown * stderr_shown - fixed * fixed
    if allowed <= 0 < fixed:
        raise UndefinedMetricError(
            f"a difference of {abs(difference):.3g} does not show with this reference, however many samples "
            f"there are: the reference alone gives a standard error of {fixed:.3g}; "
            "give a larger reference"
        )
    needed = images * stderr * stderr / allowed if allowed else math.inf
    if not math.isfinite(needed):
        raise UndefinedMetricError(
            f"a difference of {abs(difference):.3g} takes more images than can be counted"
        )
    return max(2, math.ceil(needed))
