"""What a comparison of several sets of samples yields: the scores of each, and which differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from evalkit.errors import InputError
from evalkit.pairs import Pair, Runs
from evalkit.results import Comparison, ScoreSpec, check_pairs, specs_of
from evalkit.system.records import read_record

__all__ = ["Comparisons", "Setting"]

FORMATS = ("evalkit comparisons 1",)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Several runs of one way to make samples: trainings, seeds or checkpoints.

    Attributes:
        members: Numbers of its comparisons, from 0.
        scores: What the runs have in common, by score; without those that are not known of every run.
    """

    members: tuple[int, ...]
    scores: Mapping[str, Runs] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparisons:
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

    def difference(self, score: str, first: int | str, second: int | str) -> Pair:
        """How two sets of samples, or two settings, differ in a score: the first minus the second.

        Args:
            score: Name of the score.
            first: Number of the set or setting, from 0; of a set also the name that it was given by.
            second: Likewise.

        Raises:
            InputError: There is no such score or set, or both are the same.
        """
        a, b = self._number(first), self._number(second)
        low, high = sorted((a, b))
        for pair in self.pairs:
            if (pair.score, pair.first, pair.second) == (score, low, high):
                return pair if a == low else pair.reversed()
        known = ", ".join(dict.fromkeys(pair.score for pair in self.pairs))
        raise InputError(
            f"There is no difference in {score!r} between {first!r} and {second!r}. Give two different ones "
            f"of {len(self.settings or self.comparisons)}, and one of the scores {known}."
        )

    def _number(self, which: int | str) -> int:
        names = [] if self.settings else [each.samples.name for each in self.comparisons]
        if isinstance(which, str):
            if names.count(which) == 1:
                return names.index(which)
            raise InputError(f"{which!r} is not the name of one set of samples; give its number, from 0.")
        return which

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal object."""
        record = {"format": FORMATS[0], **dataclasses.asdict(self)}
        return json.dumps(record, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Comparisons:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: Not JSON, or of another format.
        """
        return read_record(text, cls, formats=FORMATS, what="comparison of several sets of samples")
