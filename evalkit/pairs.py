"""Differences between scores, and scores of several runs, as results hold them.

:mod:`evalkit.uncertainty` computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

__all__ = ["LEVEL", "Difference", "Pair", "Runs", "pairs_with_best"]

LEVEL = 0.05
"""A difference stands if its corrected p is below this."""


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


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two of several sets of samples, or of several settings, compared in one score.

    Attributes:
        score: Name of the score.
        first: Number of the set, or of the setting, from 0.
        second: The other one.
        difference: The first minus the second; None where it could not be tested.
        corrected: ``difference.p`` corrected for the number of pairs (Holm), among all pairs in this score.
        unbiased: Whether the values without bias were compared.
        why: Why it could not be tested, or None.
    """

    score: str
    first: int
    second: int
    difference: Difference | None = None
    corrected: float | None = None
    unbiased: bool = False
    why: str | None = None

    @property
    def stands(self) -> bool:
        """Whether the two differ at the 5 % level, all pairs of this score taken together."""
        return self.corrected is not None and self.corrected < LEVEL

    def reversed(self) -> Pair:
        """The same with the two exchanged."""
        found = self.difference
        turned = None if found is None else replace(found, value=-found.value, z=-found.z)
        return replace(self, first=self.second, second=self.first, difference=turned)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """One score of several runs of one setting: trainings, seeds or checkpoints.

    Attributes:
        mean: Over the runs.
        stderr: Standard error of the mean, from runs and samples together.
        between: Standard deviation between runs, without that of sampling; None for a single run, and where
            sampling is not known.
        sampling: Standard deviation of one run from the draw of its samples; None where not known.
        runs: How many.
    """

    mean: float
    stderr: float
    between: float | None
    sampling: float | None
    runs: int


def pairs_with_best(
    pairs: Iterable[Pair],
    values: Sequence[float | None],
    unbiased: Sequence[float | None],
    *,
    higher_is_better: bool,
) -> dict[int, Pair | None]:
    """How every member with a value compares with the best one: its pair with that, None for the best itself.

    The best is chosen among the largest group of members that were tested against one another, by the values
    that their pairs compare: those without bias where all do.

    Args:
        pairs: Of one score.
        values: The score of every member; None where it was not computed.
        unbiased: The same without bias; None where that is not known.
        higher_is_better: Of the score.

    Returns:
        By the member's number, in ascending order. Empty if no pair could be tested.
    """
    pairs = list(pairs)
    group = _largest_group(pairs)
    within = [pair for pair in pairs if pair.difference is not None and {pair.first, pair.second} <= group]
    compared = unbiased if all(pair.unbiased for pair in within) else values
    known = {number: value for number in sorted(group) if (value := compared[number]) is not None}
    if not known:
        return {}
    best = (max if higher_is_better else min)(known, key=known.__getitem__)
    others = {pair.first + pair.second - best: pair for pair in pairs if best in (pair.first, pair.second)}
    return {number: others.get(number) for number, value in enumerate(values) if value is not None}


def _largest_group(pairs: Iterable[Pair]) -> set[int]:
    """The most members that tested pairs link with one another; the first of several such groups."""
    groups: list[set[int]] = []
    for pair in pairs:
        if pair.difference is not None:
            linked = [group for group in groups if group & {pair.first, pair.second}]
            groups = [group for group in groups if group not in linked]
            groups.append({pair.first, pair.second}.union(*linked))
    return max(sorted(groups, key=min), key=len, default=set())
