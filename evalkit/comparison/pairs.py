"""Several sets of samples against one reference: which differ, and in what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np

from evalkit.comparison.sources import Opened, Source
from evalkit.deviations import Deviations
from evalkit.errors import InputError, UndefinedMetricError
from evalkit.images import ImageSource
from evalkit.pairs import Difference, Pair, Runs
from evalkit.results import Comparison, Score
from evalkit.several import Setting
from evalkit.uncertainty import difference, difference_of_runs, holm, runs_of_one_setting

__all__ = [
    "Measured",
    "are_paired",
    "check_paired",
    "pairs_of_sets",
    "pairs_of_settings",
    "sets_of",
    "settings_of",
]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A comparison, and how its scores deviate, by name; scores without an error bar are not in it."""

    comparison: Comparison
    deviations: Mapping[str, Deviations]

    def deviations_of(self, name: str) -> Deviations:
        """How a score deviates.

        Raises:
            UndefinedMetricError: It was not computed, or has no error bar; the message says why.
        """
        score = self.comparison.score(name)
        if score is None:
            raise UndefinedMetricError(self.comparison.missing[name])
        if name not in self.deviations:
            raise UndefinedMetricError(score.no_stderr or "error bars were not requested")
        return self.deviations[name]


def are_paired(first: Opened, second: Opened) -> bool:
    """Whether images of the same index were made from the same noise and of the same class.

    So `evalkit sample` makes them with the same seed and classes: noise depends on seed and index alone.
    """
    if not isinstance(first, ImageSource) or not isinstance(second, ImageSource):
        return False
    seeds = [_seed(source) for source in (first, second)]
    if None in seeds or seeds[0] != seeds[1] or len(first) != len(second) or first.shape != second.shape:
        return False
    if first.labels is None or second.labels is None:
        return first.labels is second.labels
    return np.array_equal(first.labels, second.labels)


def _seed(source: ImageSource) -> tuple[str, int] | None:
    """Format and seed, where the file says that `evalkit sample` made it."""
    record = source.provenance or {}
    settings = record.get("settings")
    form, seed = record.get("format"), settings.get("seed") if isinstance(settings, Mapping) else None
    if isinstance(form, str) and form.startswith("evalkit samples ") and isinstance(seed, int):
        return form, seed
    return None


def check_paired(samples: Sequence[Opened]) -> None:
    """Raise an InputError for sets that cannot be paired, because their numbers or their classes differ."""
    if len({len(source) for source in samples}) > 1:
        listed = ", ".join(f"{len(source):,} in {source.name}" for source in samples[:4])
        raise InputError(
            f"Paired sets must have the same number of images, but there are {listed}. "
            "Leave out --paired (paired=True), or give sets with the same noise and classes."
        )
    labels = [source.labels for source in samples if source.labels is not None]
    for source in samples:
        if source.labels is not None and not np.array_equal(source.labels, labels[0]):
            raise InputError(
                f"Paired sets must have the same classes, image by image, but those of {source.name} differ. "
                "Leave out --paired (paired=True), or give sets with the same noise and classes."
            )


def sets_of(
    samples: Sequence[Source], runs: Sequence[Sequence[Source]], paired: bool | None = None
) -> tuple[list[Source], list[list[int]]]:
    """All sets of samples, and the numbers of those of each setting.

    Raises:
        InputError: Neither or both were given, or there are fewer than two settings, or one without runs; or
            ``paired`` says how the images of several sets belong together, and there are no such sets.
    """
    if isinstance(runs, str) or any(isinstance(members, str) for members in runs):
        raise InputError('Give runs as lists: runs=[["a1.npz", "a2.npz"], ["b1.npz", "b2.npz"]].')
    if samples and len(runs):
        raise InputError("Give sets of samples, or the runs of each setting (--runs, runs=), not both.")
    if paired is not None and (len(runs) or len(samples) == 1):
        raise InputError(
            "The images of several sets of samples are paired; leave out --paired and --unpaired (paired=) "
            f"with {'runs of settings' if len(runs) else 'one set'}."
        )
    if not len(runs):
        if not samples:
            raise InputError("There are no samples to compare with the reference; give at least one set.")
        return list(samples), []
    if not all(map(len, runs)) or sum(len(members) > 1 for members in runs) < 2:
        counts = " and ".join(str(len(members)) for members in runs)
        raise InputError(
            f"{len(runs)} setting{'s' * (len(runs) != 1)} with {counts} runs. Settings are compared by how "
            "much their runs vary: give at least two settings with two or more runs each. To compare single "
            "runs, give them as samples, without --runs (runs=)."
        )
    numbers = iter(range(sum(map(len, runs))))
    return [each for members in runs for each in members], [[next(numbers) for _ in each] for each in runs]


def pairs_of_sets(
    measured: Sequence[Measured], sources: Sequence[Opened], paired: bool | None = None
) -> tuple[Pair, ...]:
    """The difference of every two sets of samples in every score.

    Args:
        measured: All against the same reference.
        sources: The sets.
        paired: Whether images of the same index are of the same noise and class; None: as the files say.
    """

    @cache  # not once for each score: all labels are looked at
    def together(i: int, j: int) -> bool:
        return are_paired(sources[i], sources[j]) if paired is None else paired

    def compared(name: str, i: int, j: int) -> tuple[Difference, bool]:
        scores = _scores([measured[k].comparison for k in (i, j)], name)
        deviations = [measured[k].deviations_of(name) for k in (i, j)]
        (a, b), unbiased = _values(scores)
        return difference(a, b, *deviations, paired=together(i, j)), unbiased

    return _pairs([each.comparison for each in measured], len(measured), compared)


def settings_of(comparisons: Sequence[Comparison], groups: Sequence[Sequence[int]]) -> tuple[Setting, ...]:
    """What the runs of each setting have in common.

    Args:
        comparisons: Of all runs.
        groups: Numbers of the runs of each setting.
    """
    found = []
    for members in groups:
        scores, unbiased = {}, {}
        for name in _names(comparisons):
            try:
                runs = _scores([comparisons[i] for i in members], name)
                if len({run.n for run in runs}) == 1:  # else they differ by their bias
                    scores[name] = runs_of_one_setting([run.value for run in runs], _stderrs(runs))
                known = [run.unbiased for run in runs if run.unbiased is not None]
                if len(known) == len(runs):
                    unbiased[name] = runs_of_one_setting(known, _stderrs(runs))
            except UndefinedMetricError:
                continue
        found.append(Setting(members=tuple(members), scores=scores, unbiased=unbiased))
    return tuple(found)


def pairs_of_settings(comparisons: Sequence[Comparison], groups: Sequence[Sequence[int]]) -> tuple[Pair, ...]:
    """The difference of every two settings in every score, from their runs."""

    def compared(name: str, i: int, j: int) -> tuple[Difference, bool]:
        members = [*groups[i], *groups[j]]
        scores = _scores([comparisons[k] for k in members], name)
        values, unbiased = _values(scores)
        sides: list[Runs] = []
        for side in (slice(0, len(groups[i])), slice(len(groups[i]), None)):
            sides.append(runs_of_one_setting(values[side], _stderrs(scores[side])))
        return difference_of_runs(*sides), unbiased

    return _pairs(comparisons, len(groups), compared)


def _pairs(
    comparisons: Sequence[Comparison],
    count: int,
    compared: Callable[[str, int, int], tuple[Difference, bool]],
) -> tuple[Pair, ...]:
    found: list[Pair] = []
    for name in _names(comparisons):
        of_score = [_pair(name, i, j, compared) for i, j in combinations(range(count), 2)]
        tested = [k for k, pair in enumerate(of_score) if pair.difference is not None]
        p = [pair.difference.p for pair in of_score if pair.difference is not None]
        for k, corrected in zip(tested, holm(p), strict=True):
            of_score[k] = replace(of_score[k], corrected=corrected)
        found += of_score
    return tuple(found)


def _pair(name: str, i: int, j: int, compared: Callable[[str, int, int], tuple[Difference, bool]]) -> Pair:
    try:
        found, unbiased = compared(name, i, j)
    except (UndefinedMetricError, InputError) as error:
        return Pair(score=name, first=i, second=j, why=str(error))
    return Pair(score=name, first=i, second=j, difference=found, unbiased=unbiased)


def _names(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The scores that any of them has."""
    return iter(dict.fromkeys(score.name for each in comparisons for score in each.scores))


def _scores(comparisons: Sequence[Comparison], name: str) -> list[Score]:
    scores = []
    for comparison in comparisons:
        score = comparison.score(name)
        if score is None:
            why = comparison.missing.get(name, "it was not computed")
            raise UndefinedMetricError(f"{comparison.samples.name} has no such score: {why}")
        # Scores without an error bar do not say of how many images they are.
        scores.append(replace(score, n=score.n or comparison.samples.images or None))
    return scores


def _values(scores: Sequence[Score]) -> tuple[list[float], bool]:
    """What is compared, and whether it is the values without bias.

    Raises:
        UndefinedMetricError: They are of different numbers of images, and have a bias that is not known.
    """
    unbiased = [score.unbiased for score in scores if score.unbiased is not None]
    if len(unbiased) == len(scores):
        return unbiased, True
    counts = {score.n for score in scores}
    if len(counts) > 1:
        named = (f"{score.n:,}" if score.n else "an unknown number of" for score in scores)
        listed = " and ".join(dict.fromkeys(named))
        raise UndefinedMetricError(
            f"they are of {listed} images, and how much the score depends on that number is not known; give "
            "sets of the same size"
        )
    return [score.value for score in scores], False


def _stderrs(scores: Sequence[Score]) -> list[float] | None:
    """The sampling error of each; None if one has none."""
    found = [score.stderr_sampling for score in scores if score.stderr_sampling is not None]
    return found if len(found) == len(scores) else None
