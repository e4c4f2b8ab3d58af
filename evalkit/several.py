"""What a comparison of several sets of samples yields: the scores of each, and which differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import PurePosixPath
from typing import Any

from evalkit.errors import InputError, brief, did_you_mean
from evalkit.pairs import Pair, Runs, pairs_with_best
from evalkit.results import Comparison, ScoreSpec, Sweep, check_pairs, column, specs_of
from evalkit.system.records import InNotebooks, read_json, read_record, record_text

__all__ = ["Comparisons", "Setting", "comparisons_in", "distinct", "record_in"]

# Those of format 1 have comparisons of format 3.
FORMATS = ("evalkit comparisons 2", "evalkit comparisons 1")

Which = int | str | PathLike[str]
"""A set of samples, or a setting, among several."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Several runs of one way to make samples: trainings, seeds or checkpoints.

    Attributes:
        members: Numbers of its comparisons, from 0.
        scores: What the runs have in common, by score; without those that are not known of every run, or are
            of different numbers of images.
        unbiased: The same of the values without bias, where every run has one.
    """

    members: tuple[int, ...]
    scores: Mapping[str, Runs] = field(default_factory=dict)
    unbiased: Mapping[str, Runs] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparisons(InNotebooks):
    """Several sets of samples compared with one reference, and with each other.

    Attributes:
        comparisons: One for each set of samples, in the order given; at least two.
        pairs: The differences in every score: of every two sets or, with settings, of every two settings.
        settings: Which sets are runs of one setting; empty if that was not said.
    """

    comparisons: tuple[Comparison, ...]
    pairs: tuple[Pair, ...] = ()
    settings: tuple[Setting, ...] = ()

    def __post_init__(self) -> None:
        if len(self.comparisons) < 2:
            raise ValueError("there are fewer than two comparisons")
        check_pairs(self.pairs, len(self.settings or self.comparisons))
        if any(not 0 <= i < len(self.comparisons) for each in self.settings for i in each.members):
            raise ValueError("a setting has a run that is not there")

    @property
    def specs(self) -> tuple[ScoreSpec, ...]:
        """Every score of any comparison, in the order of tables."""
        return specs_of(self.comparisons)

    @property
    def labels(self) -> list[str]:
        """What tells the sets apart: the last parts of their names, as many as that takes."""
        return distinct([each.samples.name for each in self.comparisons])

    def difference(self, score: str, first: Which, second: Which) -> Pair:
        """How two sets of samples, or two settings, differ in a score: the first minus the second.

        Args:
            score: Name of the score.
            first: Number of the set or setting, from 0; of a set also the path that it was given by, or its
                name in tables.
            second: Likewise.

        Raises:
            InputError: There is no such score or set, or both are the same.
        """
        a, b = self._number(first), self._number(second)
        known = dict.fromkeys(pair.score for pair in self.pairs)
        if a == b:
            raise InputError(f"{first!r} and {second!r} are the same; give two different ones.")
        low, high = sorted((a, b))
        for pair in self.pairs:
            if (pair.score, pair.first, pair.second) == (score, low, high):
                return pair if a == low else pair.reversed()
        raise InputError(
            f"There is no score {score!r} here; give one of {', '.join(known)}.{did_you_mean(score, known)}"
        )

    def _number(self, which: Which) -> int:
        count = len(self.settings or self.comparisons)
        if isinstance(which, str | PathLike) and not self.settings:
            for names in ([each.samples.name for each in self.comparisons], self.labels):
                if names.count(fspath(which)) == 1:
                    return names.index(fspath(which))
        elif isinstance(which, int) and not isinstance(which, bool) and 0 <= which < count:
            return which
        kind = "settings" if self.settings else "sets of samples"
        raise InputError(
            f"{brief(repr(which))} is none of the {count} {kind}; give a number from 0 to {count - 1}"
            f"{'' if self.settings else ', or the path of a set'}."
        )

    def from_best(self, spec: ScoreSpec) -> dict[int, Pair | None]:
        """How the sets or settings compare with the best one, see :func:`evalkit.pairs.pairs_with_best`."""
        pairs = [pair for pair in self.pairs if pair.score == spec.name]
        if self.settings:
            unbiased = _means((setting.unbiased for setting in self.settings), spec.name)
            values = _means((setting.scores for setting in self.settings), spec.name)
            values = [b if a is None else a for a, b in zip(values, unbiased, strict=True)]
        else:
            values = column(self.comparisons, spec.name, "value")
            unbiased = column(self.comparisons, spec.name, "unbiased")
        return pairs_with_best(pairs, values, unbiased, higher_is_better=spec.higher_is_better)

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal object."""
        return record_text(self, FORMATS[0])

    @classmethod
    def from_json(cls, text: str | bytes) -> Comparisons:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: Not JSON, or of another format.
        """
        return read_record(text, cls, formats=FORMATS, what="comparison of several sets of samples")


def distinct(names: Sequence[str]) -> list[str]:
    """The last parts of names of files, as many as it takes to tell them apart; else all, with numbers."""
    parts = [PurePosixPath(name).parts or (name,) for name in names]
    for depth in range(1, max(map(len, parts), default=0)):
        shown = ["/".join(each[-depth:]) for each in parts]
        if len(set(shown)) == len(shown):
            return shown
    return [f"{name} ({n})" if names.count(name) > 1 else name for n, name in enumerate(names, 1)]


def record_in(text: str | bytes) -> Comparison | Comparisons | Sweep:
    """The record in what `evalkit compare` or `evalkit sweep` wrote, whichever it is.

    Raises:
        InputError: It is no such record.
    """
    kinds: dict[str, type[Comparison | Comparisons | Sweep]] = {
        "evalkit comparison": Comparison,
        "evalkit comparisons": Comparisons,
        "evalkit sweep": Sweep,
    }
    try:
        form: Any = read_json(text).get("format")
    except (ValueError, RecursionError) as error:
        why = "it is not text" if isinstance(error, UnicodeDecodeError) else error
        raise InputError(
            f"Not a record of `evalkit compare` or `evalkit sweep`: {why}. Give what `evalkit compare "
            "--json` wrote, or results.json of a sweep."
        ) from error
    kind = kinds.get(form.rpartition(" ")[0]) if isinstance(form, str) else None
    if kind is None:
        raise InputError(
            "Not a record of `evalkit compare` or `evalkit sweep`: its format is "
            f"{brief(repr(form))}. Give what `evalkit compare --json` wrote, or results.json of a sweep."
        )
    return kind.from_json(text)


def comparisons_in(record: Comparison | Comparisons | Sweep) -> list[tuple[str, Comparison]]:
    """The comparisons of a record.

    Returns:
        Each with what tells it from the others of the record: the samples, or ``scale 1.5``; empty for a
        record of one.
    """
    if isinstance(record, Comparison):
        return [("", record)]
    if isinstance(record, Sweep):
        return [(f"scale {point.scale:g}", point.comparison) for point in record.points]
    return list(zip(record.labels, record.comparisons, strict=True))


def _means(settings: Iterable[Mapping[str, Runs]], score: str) -> list[float | None]:
    """The mean of a score over the runs of every setting; None where it is not known."""
    return [None if (runs := known.get(score)) is None else runs.mean for known in settings]
