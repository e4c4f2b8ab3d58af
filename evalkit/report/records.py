"""Several records as one table of scores: marks where values cannot be compared, and why."""

from __future__ import annotations

import csv
import io
import json
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from evalkit.comparability import Reason, reasons_of
from evalkit.errors import listing
from evalkit.report.text import aligned, describe_batch, describe_extractors, shown_error
from evalkit.results import Comparison, ScoreSpec, specs_of

__all__ = ["FORMATS", "HOW_TO_READ", "Records", "markdown", "table", "to_csv", "to_json"]

FORMAT = "evalkit table 1"
HOW_TO_READ = (
    "Within a column, only values with the same letters can be compared, and only if none of the letters "
    'means "not recorded":'
)
MOST_NAMES = 4
"""Rows that are named; of more, only how many they are."""


@dataclass(frozen=True)
class Records:
    """Comparisons of one or more records.

    Attributes:
        rows: Each with its name.
    """

    rows: tuple[tuple[str, Comparison], ...]

    @property
    def comparisons(self) -> list[Comparison]:
        """In order."""
        return [comparison for _, comparison in self.rows]

    @property
    def specs(self) -> list[ScoreSpec]:
        """The scores that any of them has."""
        known = {score.name for each in self.comparisons for score in each.scores}
        return [spec for spec in specs_of(self.comparisons) if spec.name in known]

    @cached_property
    def reasons(self) -> dict[str, Reason]:
        """Why values cannot be compared, by the letter that marks them."""
        return dict(zip(_letters(), reasons_of(self.comparisons), strict=False))

    def marks(self, number: int, score: str) -> list[str]:
        """The letters of a value."""
        return [letter for letter, reason in self.reasons.items() if (number, score) in reason.cells]

    def in_words(self, reason: Reason) -> str:
        """A reason, with the scores and the rows that it marks."""
        titles = [spec.title for spec in self.specs if spec.name in reason.scores]
        rows = [self.rows[number][0] for number in reason.comparisons]
        scores = "all scores" if 1 < len(titles) == len(self.specs) else ", ".join(titles)
        of = "all" if len(rows) == len(self.rows) else listing(rows, MOST_NAMES)
        return f"{reason.text} ({scores} of {of})"


def _letters() -> Iterator[str]:
    """``a`` to ``z``, then ``aa`` and so on."""
    length = 1
    while True:
        yield from map("".join, product(string.ascii_lowercase, repeat=length))
        length += 1


def table(found: Records, width: int | None = None) -> str:
    """A table for the terminal; ``width`` as for :func:`evalkit.report.text.aligned`."""
    lines = [*_header(found), "", *aligned(_cells(found), width=width), ""]
    return "\n".join([*lines, *_below(found)]).rstrip()


def markdown(found: Records) -> str:
    """A Markdown table with the same content."""
    cells = [[cell.strip().replace("|", r"\|") for cell in row] for row in _cells(found)]
    header, *rows = (f"| {' | '.join(row)} |" for row in cells)
    lines = [header, "|---" * (2 + len(found.specs)) + "|", *rows]
    return "\n".join([*lines, *(text for line in (*_below(found), *_header(found)) for text in ("", line))])


def _header(found: Records) -> Iterator[str]:
    """References and protocols, each once; where there are several, with the rows that they are of."""
    for what, said in (
        ("reference", [describe_batch(each.reference) for each in found.comparisons]),
        ("protocol", [f"{each.protocol}; {describe_extractors(each)}" for each in found.comparisons]),
    ):
        of: dict[str, list[str]] = {}
        for (name, _), text in zip(found.rows, said, strict=True):
            of.setdefault(text, []).append(name)
        for text, names in of.items():
            yield f"{what:<10} {text}" + (f" ({listing(names, MOST_NAMES)})" if len(of) > 1 else "")


def _cells(found: Records) -> list[list[str]]:
    columns = [["record", *(name for name, _ in found.rows)]]
    counts = [each.samples.images for each in found.comparisons]
    columns.append(["images", *(f"{count:,}" if count else "-" for count in counts)])
    for spec in found.specs:
        marks = [",".join(found.marks(number, spec.name)) for number in range(len(found.rows))]
        width = max(map(len, marks))
        cells = [spec.title, *(_value(spec, comparison) for comparison in found.comparisons)]
        columns.append(
            [
                f"{cell} {each:<{width}}" if width else cell
                for cell, each in zip(cells, ["", *marks], strict=True)
            ]
        )
    return [list(row) for row in zip(*columns, strict=True)]


def _value(spec: ScoreSpec, comparison: Comparison) -> str:
    score = comparison.score(spec.name)
    if score is None:
        return "-"
    return " ".join(filter(None, (spec.format(score.value), shown_error(spec, score))))


def _below(found: Records) -> Iterator[str]:
    """What letters and bars mean, a line each."""
    if found.reasons:
        yield HOW_TO_READ
        for letter, reason in found.reasons.items():
            yield f"{letter}: {found.in_words(reason)}"
    elif len(found.rows) > 1:
        yield "Values in the same column can be compared, as far as the records say."
    if any(score.stderr is not None for each in found.comparisons for score in each.scores):
        yield "±: standard error from the draw of the images. Training again varies more."


def to_csv(found: Records) -> str:
    """A row for each comparison; reasons stand in a column after each score that has any."""
    marked = {name for reason in found.reasons.values() for name in reason.scores}
    header = ["record", "protocol", "reference", "samples", "images"]
    for spec in found.specs:
        header += [
            spec.name,
            f"{spec.name}_stderr",
            *([f"{spec.name}_reasons"] if spec.name in marked else []),
        ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for number, (name, each) in enumerate(found.rows):
        row: list[object] = [name, each.protocol]
        row += [batch.source or batch.name for batch in (each.reference, each.samples)]
        row.append(each.samples.images)
        for spec in found.specs:
            score = each.score(spec.name)
            row += [None, None] if score is None else [repr(score.value), score.stderr]
            if spec.name in marked:
                row.append("; ".join(found.reasons[mark].text for mark in found.marks(number, spec.name)))
        writer.writerow(row)
    return text.getvalue()


def to_json(found: Records) -> str:
    """The scores of each comparison with the letters of their reasons, and the reasons."""
    rows = [
        {
            "record": name,
            "protocol": each.protocol,
            "reference": each.reference.source or each.reference.name,
            "samples": each.samples.source or each.samples.name,
            "images": each.samples.images,
            "scores": {
                score.name: {
                    "value": score.value,
                    "stderr": score.stderr,
                    "unbiased": score.unbiased,
                    "marks": found.marks(number, score.name),
                }
                for score in each.scores
            },
        }
        for number, (name, each) in enumerate(found.rows)
    ]
    reasons = {
        letter: {
            "text": reason.text,
            "scores": list(reason.scores),
            "records": [found.rows[number][0] for number in reason.comparisons],
        }
        for letter, reason in found.reasons.items()
    }
    return json.dumps({"format": FORMAT, "rows": rows, "reasons": reasons}, indent=2, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Records], str]] = {
    "table": table,
    "markdown": markdown,
    "csv": lambda found: to_csv(found).rstrip("\n"),
    "json": lambda found: to_json(found).rstrip("\n"),
}
