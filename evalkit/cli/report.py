"""`evalkit report`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evalkit.cli import completion
from evalkit.cli.messages import say
from evalkit.cli.parameters import file, output, text
from evalkit.cli.records import record_at
from evalkit.errors import InputError, OutputError, brief
from evalkit.system.urls import scrubbed

if TYPE_CHECKING:
    from evalkit.report.tables import Record
    from evalkit.results import PublishedRow
    from evalkit.system.storage import Place

__all__ = ["report"]


@click.command(short_help="Write a page with scores, curves and provenance.")
@click.argument("out", type=output, metavar="OUT.html")
@click.argument("records", nargs=-1, required=True, type=file, metavar="RECORD...")
@click.option(
    "--figure",
    "figures",
    multiple=True,
    type=file,
    metavar="FILE.png",
    help="A picture to show, such as a sheet of `evalkit compare --worst`; may be repeated. The PNG's text "
    "chunks Title and Description become its heading and description.",
)
@click.option(
    "--published",
    type=text,
    metavar="DATASET",
    shell_complete=completion.datasets,
    help="Show what papers report on this dataset, such as imagenet256, next to the scores and in curves.",
)
def report(out: Place, records: tuple[Path, ...], figures: tuple[Path, ...], published: str | None) -> None:
    """Write a page with the scores of RECORDS, their error bars, curves, warnings and provenance.

    A record is a file that `evalkit compare --json` wrote, or a folder that `evalkit sweep` has filled. The
    page is one file of under 5 MB that works without a network: it can be sent, printed, and read on a phone.

    \b
    Example:
      evalkit report report.html comparison.json --figure worst.png
      evalkit report report.html a.json b.json runs/sweep --published imagenet256
    """
    from evalkit.system.files import check_writable

    if out.suffix.lower() not in (".html", ".htm"):
        raise OutputError(
            f"Cannot write {out}: the name of a page ends in .html. Give the page first, then the records."
        )
    check_writable(out, *records, *figures)
    from evalkit.report.html import write_page
    from evalkit.report.pictures import read_picture

    found = [record_at(path) for path in records]
    rows: Sequence[PublishedRow] = ()
    if published is not None:
        from evalkit.results import Sweep
        from evalkit.several import comparisons_in
        from reference_batches.published import curves, published_rows

        beside = published_rows(published)
        found = [_beside(record, beside) for record in found]
        with suppress(InputError):  # no model is published at several guidance scales
            rows = curves(published)
        sets = [each for record in found for _, each in comparisons_in(record)]
        in_curves = rows and any(isinstance(record, Sweep) for record in found)
        if not in_curves and not any(each.published for each in sets):
            protocols = " or ".join(dict.fromkeys(each.protocol for each in sets))
            say(
                f"note: the page shows no published scores of {published}: none was measured as with "
                f"--protocol {protocols}. `evalkit published {published}` lists them."
            )
    pictures = [read_picture(path) for path in figures]
    command = shlex.join(["evalkit", *map(scrubbed, sys.argv[1:])])
    try:
        notes = write_page(out, found, pictures, published=rows, command=command)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # Parts of a record are free-form, and only the checked ones can be relied on.
        raise InputError(
            f"{', '.join(map(str, records))}: a record holds values that evalkit does not write "
            f"({brief(repr(error), 200)}). Write the record again with `evalkit compare --json`."
        ) from error
    for note in notes:
        say(f"note: {note}")
    click.echo(f"wrote {out}")


def _beside(record: Record, rows: Sequence[PublishedRow]) -> Record:
    """The record with published rows beside its comparisons; of a sweep, beside the best scale."""
    from evalkit.results import Comparison, Sweep
    from reference_batches.published import beside, beside_all

    if isinstance(record, Comparison):
        return beside(record, rows)
    if isinstance(record, Sweep):
        points = list(record.points)
        for spec in record.specs:
            known = {n: value for n, value in enumerate(record.values(spec.name)) if value is not None}
            if known:
                best = (max if spec.higher_is_better else min)(known, key=known.__getitem__)
                found = beside(points[best].comparison, rows)
                points[best] = replace(points[best], comparison=found)
                break
        return replace(record, points=tuple(points))
    return replace(record, comparisons=beside_all(record.comparisons, rows))
