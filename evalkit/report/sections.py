"""What a page says of a record: tables, sentences and figures.

:mod:`evalkit.report.html` writes them as HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evalkit.report import several
from evalkit.report.classes import left_out
from evalkit.report.image_grid import base_name
from evalkit.report.inline_svg import Drawing, draw_classes
from evalkit.report.provenance import facts, provenance
from evalkit.report.published import published_cells, published_note
from evalkit.report.records import HOW_TO_READ, Records
from evalkit.report.tables import (
    NONE,
    Cell,
    Column,
    Record,
    Sets,
    Table,
    by_class,
    class_tables,
    pair_table,
    score_table,
    sets_of,
    settings_table,
    unbiased_cell,
    value_cell,
)
from evalkit.report.text import (
    BEST,
    MARKS,
    about_marks,
    drawn,
    error_notes,
    mark,
    not_compared,
    not_requested,
    precision_notes,
    spread_of,
)
from evalkit.results import NOT_REQUESTED, Comparison, PublishedRow, ScoreSpec, Sweep, specs_of
from evalkit.several import Comparisons, distinct

__all__ = ["Section", "heading_of", "section_of", "side_by_side", "title_of"]

WORSE = "worse than the best"


@dataclass(frozen=True, kw_only=True)
class Section:
    """All that is shown of one record.

    Attributes:
        heading: What it is.
        facts: What was compared: terms and their texts.
        scores: Tables of scores.
        verdicts: Which differences stand, in words.
        notes: How to read the tables, and what is missing.
        warnings: Where a number means less than it seems.
        pairs: All differences, where the verdicts are only some of them.
        published: The same scores of papers.
        citation: What these are.
        classes: Scores by class, as figures.
        class_tables: The same as tables.
        provenance: Where the numbers come from.
    """

    heading: str
    facts: tuple[tuple[str, str], ...]
    scores: tuple[Table, ...]
    verdicts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    pairs: Table | None = None
    published: Table | None = None
    citation: str = ""
    classes: tuple[Drawing, ...] = ()
    class_tables: tuple[Table, ...] = ()
    provenance: tuple[Table, ...] = ()


def heading_of(record: Record) -> str:
    """What a record is, in a line."""
    if isinstance(record, Sweep):
        count = len(record.points)
        return f"{record.name} at {count} guidance scale{'s' if count > 1 else ''}"
    if isinstance(record, Comparisons):
        first, samples = record.comparisons[0], f"{len(record.comparisons)} sets of samples"
    else:
        first, samples = record, base_name(record.samples.name)
    return f"{samples} against {base_name(first.reference.name)}"


def title_of(records: Sequence[Record]) -> str:
    """What several records are, in a line."""
    if len(records) == 1:
        return heading_of(records[0])
    sets = [each for record in records for _, each in sets_of(record)]
    references = {each.reference.digest: base_name(each.reference.name) for each in sets}
    name, *others = references.values()
    against = f"{len(references)} references" if others else name
    return f"{len(sets)} sets of samples against {against}"


def section_of(record: Record, key: str, *, figures: bool = True) -> Section:
    """All that is shown of a record.

    Args:
        record: The record.
        key: Begins the ids in it, which have to be unique in a page.
        figures: Whether to draw classes, for which Matplotlib is needed.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    sets = sets_of(record)
    tables, verdicts, notes = _SHOWN[type(record)](record)
    found = Section(
        heading=heading_of(record),
        facts=tuple(facts(sets)),
        scores=tuple(tables),
        verdicts=tuple(verdicts),
        notes=(*notes, *several.by_set(sets, precision_notes)),
        warnings=tuple(several.by_set(sets, lambda each: each.warnings)),
        pairs=pair_table(record, len(verdicts)) if isinstance(record, Comparisons) else None,
        class_tables=tuple(class_tables(sets)),
        provenance=tuple(provenance(record, sets)),
    )
    if rows := _published(sets):
        beside = [("these samples", sets[0][1])] if isinstance(record, Comparison) else sets
        cells = published_cells(specs_of(each for _, each in sets), rows, beside)
        head = [Column(title=title, numeric=0 < n < len(cells[0]) - 1) for n, title in enumerate(cells[0])]
        lines = tuple(
            tuple(_published_cell(column, text) for column, text in zip(head, line, strict=True))
            for line in cells[1:]
        )
        of_rows = [replace(each, published=rows) for _, each in sets if each.published]
        found = replace(
            found,
            published=Table(
                caption="Beside published scores", columns=tuple(head), rows=lines, sortable=True
            ),
            citation=published_note(of_rows),
        )
    if not figures:
        return found
    charts = [
        draw_classes(spec, values, name, f"{key}-c{n}")
        for n, (spec, name, values) in enumerate(by_class(sets))
    ]
    return replace(found, classes=tuple(charts))


# Scores ----------------------------------------------------------------------------------------------------


def _of_one(comparison: Comparison) -> tuple[list[Table], list[str], list[str]]:
    """Rows are metrics."""
    specs = [spec for spec in comparison.specs if comparison.missing.get(spec.name) != NOT_REQUESTED]
    notes = [_note(comparison, spec) for spec in specs]
    scores = [comparison.score(spec.name) for spec in specs]
    columns = {
        Column(title="metric"): [Cell(text=spec.title) for spec in specs],
        Column(title="value", numeric=True): [*map(value_cell, specs, scores)],
        Column(title="unbiased", numeric=True): [*map(unbiased_cell, specs, scores)],
        Column(title="better"): [Cell(text=spec.better) for spec in specs],
        Column(title="notes"): [Cell(text=note) for note in notes],
    }
    shown = {
        head: cells for head, cells in columns.items() if any(cell.text not in ("", NONE) for cell in cells)
    }
    rows = tuple(zip(*shown.values(), strict=True))
    below = [*not_requested(comparison), *error_notes(comparison)]
    return [Table(caption="Scores", columns=tuple(shown), rows=rows)], [], below


def _note(comparison: Comparison, spec: ScoreSpec) -> str:
    """Why there is no score; or how it varies over splits, and of which images it is."""
    score = comparison.score(spec.name)
    if score is None:
        return f"not computed: {comparison.missing.get(spec.name, 'no reason is recorded')}"
    of = drawn(score, comparison).strip().strip("()")
    return "; ".join(filter(None, (spread_of(spec, score), of, left_out(score))))


def _of_several(found: Comparisons) -> tuple[list[Table], list[str], list[str]]:
    """Rows are sets of samples; with settings, these come first."""
    sets = sets_of(found)
    marks = {spec.name: several.marks(found, spec) for spec in found.specs}
    with_bias = {pair.score for pair in found.pairs if not pair.unbiased}
    tables = [score_table("Scores", sets, {} if found.settings else marks, with_bias)]
    if found.settings:
        tables.insert(0, settings_table(found, marks))
        tables[1] = replace(tables[1], caption="Scores of the runs")
    where = "the table of all differences has the others"
    notes = [*several.legend(found), *several.notes(found, all_pairs=where)]
    return tables, several.verdicts(found), notes


def _of_sweep(sweep: Sweep) -> tuple[list[Table], list[str], list[str]]:
    """Rows are guidance scales."""
    marks = {}
    for spec in sweep.specs:
        found = sweep.from_best(spec)
        marks[spec.name] = [mark(found[n]) if n in found else " " for n in range(len(sweep.points))]
    with_bias = {pair.score for pair in sweep.pairs if not pair.unbiased}
    sets = sets_of(sweep)
    table = score_table("Scores at each guidance scale", sets, marks, with_bias)
    notes = [*about_marks(sweep), *not_compared(sweep), *several.what_is_missing(sets)]
    return [table], [*_sweep_verdicts(sweep)], notes


_SHOWN: dict[type, Callable[[Any], tuple[list[Table], list[str], list[str]]]] = {
    Comparison: _of_one,
    Comparisons: _of_several,
    Sweep: _of_sweep,
}


def _sweep_verdicts(sweep: Sweep) -> Iterator[str]:
    """Which scale is best in each score, and which may be as good."""
    for spec in sweep.specs:
        scales: dict[str, list[str]] = {}
        for number, pair in sweep.from_best(spec).items():
            scales.setdefault(mark(pair).strip(), []).append(f"{sweep.points[number].scale:g}")
        if scales:
            best = f"{spec.title}: best at guidance scale {scales.pop(BEST)[0]}"
            meanings = {**MARKS, "": WORSE}
            others = [f"{meanings[each]}: {', '.join(scales[each])}" for each in meanings if each in scales]
            yield "; ".join([best, *others])


def _published_cell(column: Column, text: str) -> Cell:
    if not column.numeric:
        return Cell(text=text)
    return Cell(text=NONE) if text == "-" else Cell(text=text, number=float(text))


def _published(sets: Sets) -> tuple[PublishedRow, ...]:
    """What was published beside any of the sets, each row once."""
    found: list[PublishedRow] = []
    for _, comparison in sets:
        found += [row for row in comparison.published if row not in found]
    return tuple(found)


def side_by_side(records: Sequence[Record]) -> tuple[Table, list[str]]:
    """All sets of several records in one table.

    Returns:
        The table, with letters at the values that cannot be compared; and what the letters mean.
    """
    names = iter(distinct([each.samples.name for record in records for _, each in sets_of(record)]))
    rows = []
    for record in records:
        for label, comparison in sets_of(record):
            name = next(names)
            rows.append((f"{record.name}, {label}" if isinstance(record, Sweep) else name, comparison))
    found = Records(tuple(rows))
    marks = {
        spec.name: [", ".join(found.marks(number, spec.name)) for number in range(len(rows))]
        for spec in found.specs
    }
    meanings = [f"{letter}: {found.in_words(reason)}" for letter, reason in found.reasons.items()]
    return score_table("Side by side", rows, marks), [HOW_TO_READ, *meanings] if meanings else []
