"""Tables of a page: scores, differences, classes. :mod:`evalkit.report.html` writes them as HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from evalkit.pairs import Pair
from evalkit.report import several
from evalkit.report.image_grid import base_name
from evalkit.report.text import MARKS, shown_error
from evalkit.results import Comparison, Score, ScoreSpec, Sweep, specs_of
from evalkit.several import Comparisons, comparisons_in

__all__ = [
    "Cell",
    "Column",
    "Record",
    "Sets",
    "Table",
    "by_class",
    "class_tables",
    "pair_table",
    "score_table",
    "sets_of",
    "settings_table",
    "unbiased_cell",
    "value_cell",
]

NONE = "–"
Record: TypeAlias = Comparison | Comparisons | Sweep


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        number: By which the column is sorted; None to sort by the text.
        error: ``± 0.03``.
        mark: One of :data:`evalkit.report.text.MARKS`, or letters that the lines below the table explain.
        bar: Where value and error bar lie between the ends of the column, in percent: low, value, high.
        code: Whether it is for machines: digests, parameters.
    """

    text: str = ""
    number: float | None = None
    error: str = ""
    mark: str = ""
    bar: tuple[float, float, float] | None = None
    code: bool = False

    @property
    def meaning(self) -> str:
        """What the mark means."""
        return MARKS.get(self.mark, f"see {self.mark} below")


@dataclass(frozen=True, kw_only=True)
class Column:
    """The head of a column."""

    title: str
    note: str = ""
    numeric: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first cell of a row is its head.

    Attributes:
        caption: What it shows.
        columns: The heads.
        rows: As many cells each as there are columns.
        sortable: Whether its order says nothing, so that a reader may choose another.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sortable: bool = False


Sets: TypeAlias = Sequence[tuple[str, Comparison]]
"""Comparisons with the names that a page gives them."""


def sets_of(record: Record) -> Sets:
    """The comparisons in a record, each with what tells it from the others."""
    return [(name or base_name(each.samples.name), each) for name, each in comparisons_in(record)]


def score_table(
    caption: str, sets: Sets, marks: Mapping[str, Sequence[str]], with_bias: Iterable[str] = ()
) -> Table:
    """Rows are sets, columns scores.

    Args:
        caption: Of the table.
        sets: Its rows.
        marks: Of every set, by score.
        with_bias: Scores whose values were compared with their bias, so that the marks are of these.
    """
    specs = specs_of(each for _, each in sets)
    images = [each.samples.images for _, each in sets]
    columns = [Column(title="samples")]
    cells = [[Cell(text=name) for name, _ in sets]]
    for spec in specs:
        scores = [each.score(spec.name) for _, each in sets]
        if all(score is None for score in scores):
            continue  # the notes say why
        own = marks.get(spec.name, [""] * len(sets))
        columns.append(Column(title=spec.title, note=f"{spec.better} is better", numeric=True))
        cells.append(_with_bars(spec, scores))
        if any(score is not None and score.unbiased is not None for score in scores):
            columns.append(Column(title=f"{spec.title}, unbiased", numeric=True))
            cells.append([unbiased_cell(spec, score) for score in scores])
        marked = -2 if columns[-1].note == "" and spec.name in with_bias else -1
        cells[marked] = [
            replace(cell, mark=each.strip()) for cell, each in zip(cells[marked], own, strict=True)
        ]
    columns.append(Column(title="images", numeric=True))
    cells.append([Cell(text=f"{count:,}" if count else NONE, number=count or None) for count in images])
    rows = tuple(zip(*cells, strict=True))
    return Table(caption=caption, columns=tuple(columns), rows=rows, sortable=True)


def settings_table(found: Comparisons, marks: Mapping[str, Sequence[str]]) -> Table:
    """Rows are settings: the means of their runs."""
    known = {name for setting in found.settings for name in setting.scores}
    specs = [spec for spec in found.specs if spec.name in known]
    unbiased = {pair.score for pair in found.pairs if pair.unbiased}
    rows = []
    for number, name in enumerate(several.members(found)):
        setting = found.settings[number]
        cells = [Cell(text=name), Cell(text=f"{len(setting.members)}", number=len(setting.members))]
        for spec in specs:
            for of in (setting.scores, setting.unbiased)[: 1 + (spec.name in unbiased)]:
                runs = of.get(spec.name)
                if runs is None:
                    cells.append(Cell(text=NONE))
                else:
                    error = f"± {spec.format(runs.stderr)}"
                    cells.append(Cell(text=spec.format(runs.mean), number=runs.mean, error=error))
            cells[-1] = replace(cells[-1], mark=marks[spec.name][number].strip())
        rows.append(tuple(cells))
    columns = [Column(title="mean of the runs"), Column(title="runs", numeric=True)]
    for spec in specs:
        columns.append(Column(title=spec.title, note=f"{spec.better} is better", numeric=True))
        columns += [Column(title=f"{spec.title}, unbiased", numeric=True)] * (spec.name in unbiased)
    return Table(caption="Means of the settings", columns=tuple(columns), rows=tuple(rows), sortable=True)


def value_cell(spec: ScoreSpec, score: Score | None) -> Cell:
    """A score with its error bar."""
    if score is None:
        return Cell(text=NONE)
    return Cell(text=spec.format(score.value), number=score.value, error=shown_error(spec, score))


def unbiased_cell(spec: ScoreSpec, score: Score | None) -> Cell:
    """A score without bias."""
    if score is None or score.unbiased is None:
        return Cell(text=NONE)
    return Cell(text=spec.format(score.unbiased), number=score.unbiased)


def _with_bars(spec: ScoreSpec, scores: Sequence[Score | None]) -> list[Cell]:
    """The cells of a column, each with its place among the others."""
    cells = [value_cell(spec, score) for score in scores]
    known = [(score.value, score.stderr or 0.0) for score in scores if score is not None]
    low, high = min(v - e for v, e in known), max(v + e for v, e in known)
    if len(known) < 2 or not 0 < high - low < math.inf:
        return cells

    def place(at: float) -> float:
        return round(100 * (at - low) / (high - low), 1)

    for number, score in enumerate(scores):
        if score is not None:
            value, error = score.value, score.stderr or 0.0
            bar = place(value - error), place(value), place(value + error)
            cells[number] = replace(cells[number], bar=bar)
    return cells


def pair_table(found: Comparisons, shown: int) -> Table | None:
    """Every difference, where there are more than the verdicts tell."""
    tested = [pair for pair in found.pairs if pair.difference is not None]
    if len(tested) <= shown:
        return None
    specs = {spec.name: spec for spec in found.specs}
    names = several.members(found)

    def row(pair: Pair) -> tuple[Cell, ...]:
        difference, spec = pair.difference, specs[pair.score]
        sides = [Cell(text=spec.title), Cell(text=names[pair.first]), Cell(text=names[pair.second])]
        if difference is None or pair.corrected is None:
            return (*sides, Cell(text=NONE), Cell(text=NONE), Cell(text=NONE), Cell(text=str(pair.why)))
        a_is_better = (difference.value > 0) == spec.higher_is_better
        verdict = f"{names[pair.first if a_is_better else pair.second]} is better"
        return (
            *sides,
            Cell(
                text=spec.format(difference.value),
                number=difference.value,
                error=f"± {spec.format(difference.stderr)}",
            ),
            Cell(text=f"{difference.z:.1f}", number=difference.z),
            Cell(text=f"{pair.corrected:.2g}", number=pair.corrected),
            Cell(text=verdict if pair.stands else "no difference shown"),
        )

    titles = (
        "metric",
        "first",
        "second",
        "first minus second",
        "t" if found.settings else "z",
        "p",
        "verdict",
    )
    columns = tuple(Column(title=title, numeric=title in titles[3:6]) for title in titles)
    rows = tuple(row(pair) for pair in found.pairs)
    return Table(caption="All differences", columns=columns, rows=rows, sortable=True)


def by_class(sets: Sets) -> Iterator[tuple[ScoreSpec, str, Mapping[str, float]]]:
    """Every score that is known by class, with the set that it is of."""
    for spec in specs_of(each for _, each in sets):
        for name, comparison in sets:
            if (score := comparison.score(spec.name)) is not None and score.by_class:
                yield spec, name, score.by_class


def class_tables(sets: Sets) -> Iterator[Table]:
    """For each score known by class, the value and the rank of every class in every set."""
    found: dict[ScoreSpec, list[tuple[str, Mapping[str, float]]]] = {}
    for spec, name, values in by_class(sets):
        found.setdefault(spec, []).append((name, values))
    for spec, columns in found.items():
        head = [Column(title="class")]
        ranks = []
        for name, values in columns:
            of = f", {name}" if len(columns) > 1 else ""
            head += [Column(title=f"{spec.title}{of}", numeric=True), Column(title=f"rank{of}", numeric=True)]
            ranked = sorted(values, key=values.__getitem__, reverse=spec.higher_is_better)
            ranks.append({label: rank for rank, label in enumerate(ranked, 1)})
        rows = []
        for label in dict.fromkeys(label for rank in ranks for label in rank):
            cells = [Cell(text=label)]
            for (_, values), rank in zip(columns, ranks, strict=True):
                if label in values:
                    cells.append(Cell(text=spec.format(values[label]), number=values[label]))
                    cells.append(Cell(text=f"{rank[label]}", number=rank[label]))
                else:
                    cells += [Cell(text=NONE)] * 2
            rows.append(tuple(cells))
        caption = f"{spec.title} by class: {len(rows):,} classes, {spec.better} is better"
        yield Table(caption=caption, columns=tuple(head), rows=tuple(rows), sortable=True)
