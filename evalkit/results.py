"""What a comparison yields: scores with their parameters, and the record of how they were obtained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evalkit.batches import Batch
from evalkit.pairs import Pair, pairs_with_best
from evalkit.system.records import InNotebooks, read_record, record_text

__all__ = [
    "NOT_REQUESTED",
    "ClosePair",
    "Comparison",
    "Point",
    "PublishedRow",
    "Score",
    "ScoreSpec",
    "Sweep",
    "check_pairs",
    "column",
    "specs_of",
]

# Earlier records are read likewise: those of format 3 lack byte rules, labels and what scores look at, and
# those of format 2 also standard errors.
FORMATS = ("evalkit comparison 4", "evalkit comparison 3", "evalkit comparison 2")
# Sweeps of format 4 have comparisons of format 3; those of format 3 have no differences between scales, and
# those of format 2 no standard errors either.
SWEEP_FORMATS = ("evalkit sweep 5", "evalkit sweep 4", "evalkit sweep 3", "evalkit sweep 2")

NOT_REQUESTED = "not requested"
"""Reason for a missing score of the protocol if other metrics were requested."""

MOST_DECIMALS = 20


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """How a score is called and shown. A metric has one for each score that it yields.

    Attributes:
        name: Short name, such as ``fid``: in ``--metrics``, CSV and JSON.
        title: Name in tables and plots, such as ``FID``.
        higher_is_better: Whether more is better.
        decimals: Digits after the point in tables.
    """

    name: str
    title: str
    higher_is_better: bool
    decimals: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.decimals <= MOST_DECIMALS:
            raise ValueError(f"{self.name} has {self.decimals} decimals; expected 0 to {MOST_DECIMALS}")

    @property
    def better(self) -> str:
        """``"higher"`` or ``"lower"``."""
        return "higher" if self.higher_is_better else "lower"

    def format(self, value: float) -> str:
        """``value`` as tables show it."""
        return f"{value:.{self.decimals}f}"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of one metric.

    Attributes:
        name: Name of its :class:`ScoreSpec`.
        value: The value; always finite.
        std: Standard deviation over the metric's own splits or classes, if it has any.
        parameters: The metric's parameters, so that a report can state how the score was computed.
        stderr: Standard error from the draw of samples and reference. Retraining varies more.
        stderr_sampling: Its part from the draw of the samples.
        stderr_reference: Its part from the draw of the reference, which all scores against it share; None if
            only statistics of the reference are known, or if the metric does not use the reference.
        no_stderr: Why there is no standard error, if one was requested.
        unbiased: Estimate of the value for infinitely many images; None if unknown.
        n: Number of samples behind the standard error.
        outputs: Network outputs that it uses, such as ``inception:pool``; empty if not recorded.
        reference: The part of the reference that it uses: its ``images``, the ``statistics`` in its file, or
            ``nothing``; None if not recorded.
        samples: The same for the samples.
        by_class: The value within each class, by label; empty for scores without classes.
    """

    name: str
    value: float
    std: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stderr: float | None = None
    stderr_sampling: float | None = None
    stderr_reference: float | None = None
    no_stderr: str | None = None
    unbiased: float | None = None
    n: int | None = None
    outputs: tuple[str, ...] = ()
    reference: Literal["images", "statistics", "nothing"] | None = None
    samples: Literal["images", "statistics"] | None = None
    by_class: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """What a paper reports for one model on one dataset.

    Attributes:
        dataset: For example ``imagenet256``.
        model: The paper's name for the model, and whatever else tells its rows apart.
        scores: Values by score name, rounded as printed; what the paper does not print is left out.
        images: How many samples they are of.
        paper: Its title and where it is.
        table: Number of the table in it, or where else the row stands.
        scale: Of the guidance, where it was used and is known.
        guidance: Its kind, such as ``none``, ``cfg`` or ``classifier``.
        steps: Of the sampler, as the paper has it.
        evaluator: What computed the scores; only rows of one evaluator are like for like.
        reference: The file or published batch that the samples were compared with.
        batch: Name of the published samples that the scores are of.
        note: What else should be known.
    """

    dataset: str
    model: str
    scores: Mapping[str, float]
    images: int
    paper: str
    table: int | str
    scale: float | None = None
    guidance: str | None = None
    steps: str | None = None
    evaluator: str = "adm"
    reference: str | None = None
    batch: str | None = None
    note: str | None = None

    @property
    def source(self) -> str:
        """Paper and table, in short: ``arXiv:2105.05233v4, table 5``."""
        _, found, number = self.paper.rpartition("arXiv:")
        return f"{found}{number}, {'table ' if isinstance(self.table, int) else ''}{self.table}"


@dataclass(frozen=True, kw_only=True)
class ClosePair:
    """A sample and the image of the reference that is nearest to it.

    Attributes:
        sample: Its index, from 0.
        reference: Index of that image.
        distance: Euclidean distance of their features.
        to_another: Distance of the same image to the nearest other image of the reference.
    """

    sample: int
    reference: int
    distance: float
    to_another: float

    @property
    def ratio(self) -> float | None:
        """``distance / to_another``: below 1 the sample is nearer than any other image of the reference.

        None if that image is in the reference twice.
        """
        return self.distance / self.to_another if self.to_another else None


@dataclass(frozen=True, kw_only=True)
class Comparison(InNotebooks):
    """Samples compared with a reference: the scores, and everything needed to believe them.

    Attributes:
        specs: All scores that were requested or that the protocol has, in the order of tables.
        scores: What was computed, in the same order.
        missing: Why a score was not computed, by name.
        protocol: Name of the protocol, such as ``adm``.
        reference: The reference batch.
        samples: The sample batch.
        extractors: By network: name, fingerprint, backend, precision, device, what is done to images before
            (``preprocess``); source and digests of the weights.
        byte_rules: By protocol, what is done to images that are not 8-bit RGB of the right size; empty: not
            recorded.
        warnings: Where a number means less than it seems, one sentence each.
        precision_check: For a precision other than float32, the scores of the first images of both batches
            in both: ``{"images": [n, m], "float32": {...}, <precision>: {...}}``. Empty in float32.
        published: What was published on the reference's dataset, to be shown beside the scores.
        published_rows: How many such rows there are; ``published`` may be the nearest of them.
        closest: Samples and the images of the reference nearest to them, the nearest first, by the output
            that the features are of, such as ``inception:pool``. Empty if not asked for.
        versions: evalkit, Python and the libraries that did the arithmetic.
        seconds: Wall time of each stage.
    """

    specs: tuple[ScoreSpec, ...]
    scores: tuple[Score, ...]
    missing: Mapping[str, str]
    protocol: str
    reference: Batch
    samples: Batch
    extractors: Mapping[str, Mapping[str, Any]]
    byte_rules: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    precision_check: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[PublishedRow, ...] = ()
    published_rows: int = 0
    closest: Mapping[str, tuple[ClosePair, ...]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The value of a score by its name, ``comparison["fid"]``.

        Raises:
            KeyError: It was not computed; the message says why.
        """
        if (score := self.score(name)) is not None:
            return score.value
        known = [score.name for score in self.scores]
        raise KeyError(self.missing.get(name, f"no score {name!r}; there are {known}"))

    def score(self, name: str) -> Score | None:
        """The score of that name; None where it was not computed."""
        return next((score for score in self.scores if score.name == name), None)

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal object."""
        return record_text(self, FORMATS[0])

    @classmethod
    def from_json(cls, text: str | bytes) -> Comparison:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: Not JSON, or of another format.
        """
        return read_record(text, cls, formats=FORMATS, what="comparison")

    def __post_init__(self) -> None:
        known = {spec.name for spec in self.specs}
        if unknown := [name for name in (*(s.name for s in self.scores), *self.missing) if name not in known]:
            raise ValueError(f"scores without a specification: {', '.join(unknown)}")
        for network, extractor in self.extractors.items():
            if not {"name", "fingerprint"} <= extractor.keys():
                raise ValueError(f"the extractor {network} has no name or fingerprint")


def check_pairs(pairs: Iterable[Pair], count: int) -> None:
    """Raise a ValueError for a pair that is not of ``count`` members."""
    if any(not 0 <= pair.first < pair.second < count for pair in pairs):
        raise ValueError(f"a pair is not two of {count}")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One guidance scale of a sweep."""

    scale: float
    comparison: Comparison


@dataclass(frozen=True, kw_only=True)
class Sweep(InNotebooks):
    """One model at several guidance scales, everything else alike.

    Attributes:
        name: What a plot calls it.
        points: By ascending scale; at least one.
        settings: What the samples have in common, as JSON takes it.
        pairs: The differences of every two scales in every score; numbers are those of the points.
    """

    name: str
    points: tuple[Point, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a sweep has at least one scale")
        check_pairs(self.pairs, len(self.points))

    @property
    def specs(self) -> tuple[ScoreSpec, ...]:
        """Every score of any scale, in the order of tables."""
        return specs_of(point.comparison for point in self.points)

    def values(self, score: str) -> list[float | None]:
        """A score at every scale; None where it was not computed."""
        return self._column(score, "value")

    def stderrs(self, score: str) -> list[float | None]:
        """Standard error of a score at every scale; None where it has none."""
        return self._column(score, "stderr")

    def unbiased(self, score: str) -> list[float | None]:
        """A score at every scale for infinitely many images; None where that is not known."""
        return self._column(score, "unbiased")

    def _column(self, score: str, what: Literal["value", "stderr", "unbiased"]) -> list[float | None]:
        return column((point.comparison for point in self.points), score, what)

    def from_best(self, spec: ScoreSpec) -> dict[int, Pair | None]:
        """How the scales compare with the best one, see :func:`evalkit.pairs.pairs_with_best`."""
        pairs = [pair for pair in self.pairs if pair.score == spec.name]
        sides = self.values(spec.name), self.unbiased(spec.name)
        return pairs_with_best(pairs, *sides, higher_is_better=spec.higher_is_better)

    def to_csv(self) -> str:
        """A table, one row a scale: ``scale``, the scores (empty where not computed), ``samples``.

        Then, for each score of which some are known, ``<score>_stderr``, ``<score>_unbiased`` and
        ``<score>_from_best``: corrected p of the difference from the best scale, empty for the best itself.
        """
        names = [spec.name for spec in self.specs]
        columns = {name: self.values(name) for name in names}
        images: list[float | None] = [point.comparison.samples.images for point in self.points]
        columns["samples"] = images
        for spec in self.specs:
            pairs = self.from_best(spec)
            found = [pairs.get(number) for number in range(len(self.points))]
            for what, values in (
                ("stderr", self.stderrs(spec.name)),
                ("unbiased", self.unbiased(spec.name)),
                ("from_best", [None if pair is None else pair.corrected for pair in found]),
            ):
                if any(value is not None for value in values):
                    columns[f"{spec.name}_{what}"] = values
        rows = [",".join(("scale", *columns))]
        for point, *values in zip(self.points, *columns.values(), strict=True):
            cells = ["" if value is None else repr(value) for value in values]
            rows.append(",".join([f"{point.scale:g}", *cells]))
        return "\n".join(rows) + "\n"

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal object."""
        return record_text(self, SWEEP_FORMATS[0])

    @classmethod
    def from_json(cls, text: str | bytes) -> Sweep:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: Not JSON, or of another format.
        """
        return read_record(text, cls, formats=SWEEP_FORMATS, what="sweep")


def specs_of(comparisons: Iterable[Comparison]) -> tuple[ScoreSpec, ...]:
    """The scores of several comparisons, each once, in the order in which they first appear."""
    return tuple({spec.name: spec for found in comparisons for spec in found.specs}.values())


def column(
    comparisons: Iterable[Comparison], score: str, what: Literal["value", "stderr", "unbiased"]
) -> list[float | None]:
    """A field of one score in every comparison; None where there is none."""
    found = (comparison.score(score) for comparison in comparisons)
    return [None if each is None else getattr(each, what) for each in found]
