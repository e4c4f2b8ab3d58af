"""What a comparison yields: scores with their parameters, and the record of how they were obtained."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evalkit.errors import InputError

__all__ = ["Batch", "Comparison", "PublishedRow", "Score", "Sweep"]

FORMAT = "evalkit comparison 1"
SWEEP_FORMAT = "evalkit sweep 1"

SCORES = ("fid", "sfid", "inception_score", "precision", "recall")
"""The columns of a sweep's table."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of one metric.

    Attributes:
        name: Field-standard short name: ``fid``, ``sfid``, ``inception_score``, ``precision`` or ``recall``.
        value: The number itself; always finite.
        better: Which direction is better.
        spread: Standard deviation over the metric's own splits, where it has splits.
        parameters: The metric's parameters, so that a report can say how the number was made.
    """

    name: str
    value: float
    better: Literal["lower", "higher"]
    spread: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One side of a comparison.

    Attributes:
        name: Path, or ``<array>``.
        images: Number of images whose features were used; 0 where the file holds statistics alone.
        image_shape: (height, width, 3), or None.
        digest: Digest of the images.
        statistics: Where mean and covariance came from: ``images``, or ``file`` (its ``mu`` and so on).
        statistics_images: How many images these are of; None where the file does not say.
        features: ``extracted``, ``stored`` (read back from the store) or ``file`` (a features file).
        statistics_digest: Digest of the statistics that the file has; None where it has none.
    """

    name: str
    images: int
    image_shape: tuple[int, ...] | None
    digest: str
    statistics: Literal["images", "file"]
    features: Literal["extracted", "stored", "file"]
    statistics_images: int | None = None
    statistics_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """What a paper reports for one model on one dataset.

    Attributes:
        dataset: For example ``imagenet256``.
        model: The paper's name of the model, with what else tells its rows apart.
        scores: Values by score name, rounded as printed; what the paper does not print is not there.
        images: How many samples they are of.
        paper: Its title and where it is.
        table: Number of the table in it.
        scale: Of classifier guidance, where that was used.
    """

    dataset: str
    model: str
    scores: Mapping[str, float]
    images: int
    paper: str
    table: int
    scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Samples compared with a reference: the scores, and everything needed to believe them.

    Attributes:
        scores: What was computed, in the reference evaluator's order.
        missing: Why a score is not there, by name.
        protocol: ``adm`` or ``exact``.
        reference: The reference batch.
        samples: The sample batch.
        extractor: Name, fingerprint, backend, precision, device; source and digests of the weights.
        warnings: Where a number means less than it seems, one sentence each.
        drift: For a precision other than float32, what it moves each score by on the first images of both
            batches: ``{"images": n, "float32": {...}, <precision>: {...}}``. Empty in float32.
        published: What was published on the reference's dataset, to be shown beside the scores.
        versions: evalkit, Python and the libraries that did the arithmetic.
        seconds: Wall time of each stage.
    """

    scores: tuple[Score, ...]
    missing: Mapping[str, str]
    protocol: str
    reference: Batch
    samples: Batch
    extractor: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    drift: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[PublishedRow, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The value of a score by its name, ``comparison["fid"]``.

        Raises:
            KeyError: It was not computed; the message says why.
        """
        for score in self.scores:
            if score.name == name:
                return score.value
        raise KeyError(
            self.missing.get(name, f"no score {name!r}; there are {[score.name for score in self.scores]}")
        )

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal object."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Comparison:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: Not JSON, or of another format.
        """
        try:
            values = _loads(text)
            if (found := values.pop("format")) != FORMAT:
                raise ValueError(f"it holds {found!r}")
            for side in ("reference", "samples"):
                shape = values[side]["image_shape"]
                values[side] = Batch(
                    **values[side] | {"image_shape": None if shape is None else tuple(shape)}
                )
            values["scores"] = tuple(Score(**score) for score in values["scores"])
            values["warnings"] = tuple(map(str, values["warnings"]))
            # Absent from what was written before there were any.
            values["published"] = tuple(PublishedRow(**row) for row in values.get("published", ()))
            found = cls(**values)
            _check(found)
            return found
        except _NOT_OURS as error:
            raise InputError(f"Not a comparison written by evalkit ({FORMAT!r}): {error!r}.") from error


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One model at several guidance scales, everything else alike.

    Attributes:
        name: What a plot calls it.
        points: (scale, comparison), by ascending scale; at least one.
        settings: What the samples have in common, as JSON takes it.
    """

    name: str
    points: tuple[tuple[float, Comparison], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def values(self, score: str) -> list[float | None]:
        """A score at every scale; None where it was not computed."""
        return [
            next((found.value for found in comparison.scores if found.name == score), None)
            for _, comparison in self.points
        ]

    def to_csv(self) -> str:
        """A table, one row a scale: ``scale``, the scores (empty where not computed), ``samples``."""
        columns = [self.values(score) for score in SCORES]
        rows = [",".join(("scale", *SCORES, "samples"))]
        for (scale, comparison), *values in zip(self.points, *columns, strict=True):
            cells = ["" if value is None else repr(value) for value in values]
            rows.append(",".join([f"{scale:g}", *cells, str(comparison.samples.images)]))
        return "\n".join(rows) + "\n"

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal object."""
        points = [
            {"scale": scale, "comparison": json.loads(comparison.to_json())}
            for scale, comparison in self.points
        ]
        record = {"format": SWEEP_FORMAT, "name": self.name, "settings": self.settings, "points": points}
        return json.dumps(record, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Sweep:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: Not JSON, or of another format.
        """
        try:
            record = _loads(text)
            if record["format"] != SWEEP_FORMAT or not record["points"]:
                raise ValueError(f"it holds {record['format']!r}")
            points = [
                (_number(point["scale"]), Comparison.from_json(json.dumps(point["comparison"])))
                for point in record["points"]
            ]
            return cls(name=str(record["name"]), points=tuple(points), settings=dict(record["settings"]))
        except _NOT_OURS as error:
            raise InputError(f"Not a sweep written by evalkit ({SWEEP_FORMAT!r}): {error!r}.") from error


# What a record that something else wrote, or that is damaged, ends in.
_NOT_OURS = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


def _loads(text: str | bytes) -> dict[str, Any]:
    """JSON of finite numbers, an object at its top; ValueError or RecursionError for anything else."""

    def refuse(constant: str) -> float:
        raise ValueError(f"it holds {constant}")

    return dict(json.loads(text, parse_constant=refuse))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _check(comparison: Comparison) -> None:
    """Raise a ValueError unless a comparison that was read has what is shown of it."""
    for score in comparison.scores:
        numbers = [score.value] if score.spread is None else [score.value, score.spread]
        if not isinstance(score.name, str) or not isinstance(score.parameters, Mapping):
            raise ValueError(f"a score is called {score.name!r}")
        for value in numbers:
            _number(value)
    for batch in (comparison.reference, comparison.samples):
        if isinstance(batch.images, bool) or not isinstance(batch.images, int):
            raise ValueError(f"{batch.images!r} images")
        if not all(isinstance(text, str) for text in (batch.name, batch.digest, batch.statistics)):
            raise ValueError(f"a batch is called {batch.name!r}")
    for mapping in (comparison.missing, comparison.extractor, comparison.drift, comparison.versions):
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{mapping!r} is no table")
    if not all(isinstance(text, str) for text in comparison.missing.values()):
        raise ValueError("the reason why a score is missing is no text")
    if not {"name", "fingerprint"} <= comparison.extractor.keys():
        raise ValueError("the extractor has no name or fingerprint")
