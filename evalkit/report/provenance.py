"""Where the numbers of a record come from: batches, networks, parameters, versions, times."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evalkit.batches import Batch
from evalkit.report.tables import NONE, Cell, Column, Record, Sets, Table
from evalkit.report.text import describe_batch, describe_extractors
from evalkit.results import Sweep

__all__ = ["facts", "provenance"]


def facts(sets: Sets) -> Iterator[tuple[str, str]]:
    """What was compared: terms and their texts."""
    first = sets[0][1]
    yield "Reference", describe_batch(first.reference)
    if len(sets) == 1:
        yield "Samples", describe_batch(first.samples)
    for term, text in (
        ("Protocol", lambda each: each.protocol),
        ("Network", describe_extractors),
    ):
        yield term, "; ".join(dict.fromkeys(text(each) for _, each in sets))


def provenance(record: Record, sets: Sets) -> Iterator[Table]:
    """Where the numbers of a record come from, a table for each kind of source."""
    references = {each.reference: "reference" for _, each in sets}
    batches = [*references.items(), *((each.samples, name) for name, each in sets)]
    yield Table(
        caption="Batches",
        columns=tuple(
            Column(title=title)
            for title in ("batch", "name", "images", "size", "digest", "statistics", "features")
        ),
        rows=tuple(_batch(name, batch) for batch, name in batches),
    )
    for caption, found in (
        ("Networks", lambda each: each.extractors),
        ("Parameters", lambda each: {score.name: score.parameters for score in each.scores}),
        ("Versions", lambda each: each.versions),
        ("Seconds", lambda each: {stage: f"{seconds:.1f}" for stage, seconds in each.seconds.items()}),
    ):
        if table := _facts_table(caption, [(name, found(each)) for name, each in sets]):
            yield table
    if isinstance(record, Sweep) and record.settings:
        table = _facts_table("Settings of the samples", [("", record.settings)])
        if table:
            yield table


def _batch(name: str, batch: Batch) -> tuple[Cell, ...]:
    size = NONE if batch.image_shape is None else f"{batch.image_shape[1]}x{batch.image_shape[0]}"
    statistics = "of the images"
    if batch.statistics == "file":
        of = f" of {batch.statistics_images:,} images" if batch.statistics_images else ""
        statistics = f"from the file{of}, {(batch.statistics_digest or '')}"
    return (
        Cell(text=name),
        Cell(text=batch.name),
        Cell(text=f"{batch.images:,}"),
        Cell(text=size),
        Cell(text=batch.digest, code=True),
        Cell(text=statistics),
        Cell(text=f"{batch.features}, {batch.extracted_by}" if batch.extracted_by else batch.features),
    )


def _facts_table(caption: str, sets: Sequence[tuple[str, Mapping[str, Any]]]) -> Table | None:
    """Free-form values, a line each; those that differ between sets with the set that they are of."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, values in sets:
        for line in _flat(values):
            lines.setdefault(line, []).append(name)
    if not lines:
        return None
    differs = any(len(names) < len(sets) for names in lines.values())
    head = [Column(title="name"), Column(title="value")]
    head += [Column(title="of")] * differs
    rows = []
    for (key, value), names in lines.items():
        cells = [Cell(text=key), Cell(text=value, code=True)]
        rows.append((*cells, *[Cell(text="all" if len(names) == len(sets) else ", ".join(names))] * differs))
    return Table(caption=caption, columns=tuple(head), rows=tuple(rows))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}, ")
        else:
            yield f"{before}{key}", value if isinstance(value, str) else json.dumps(value, default=str)
