"""`evalkit table`: several records in one table."""

from __future__ import annotations

from pathlib import Path

import click

from evalkit.cli.messages import terminal_width
from evalkit.cli.parameters import file
from evalkit.cli.records import record_at
from evalkit.errors import InputError

__all__ = ["table"]


@click.command(short_help="Show records in one table; mark incomparable scores.")
@click.argument("records", nargs=-1, required=True, type=file)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "markdown", "csv", "json"]),
    default="table",
    show_default=True,
    help="How to show the table.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Exit with code 2 and print no table if any values cannot be compared. By default they are marked.",
)
def table(records: tuple[Path, ...], format_: str, strict: bool) -> None:
    """Put the scores of RECORDS into one table, mark values that cannot be compared, and say why.

    A record is a file that `evalkit compare --json` wrote, for one or several sets of samples, a folder that
    `evalkit sweep` has filled, or the results.json in it.

    \b
    Example:
      evalkit table a.json b.json runs/s
      evalkit table a.json b.json --format markdown --strict
    """
    from evalkit.report import records as report
    from evalkit.report.records import Records
    from evalkit.several import comparisons_in, distinct

    paths = [path / "results.json" if path.is_dir() else path for path in records]
    rows = []
    for path, name in zip(paths, distinct([str(path) for path in paths]), strict=True):
        for which, comparison in comparisons_in(record_at(path)):
            rows.append((f"{name}: {which}" if which else name, comparison))
    found = Records(tuple(rows))
    if strict and found.reasons:
        first, *others = (found.in_words(reason) for reason in found.reasons.values())
        more = f" And {len(others)} more." if others else ""
        raise InputError(
            f"These records cannot be compared: {first}.{more} Without --strict, the table marks such values."
        )
    click.echo(
        report.table(found, terminal_width()) if format_ == "table" else report.FORMATS[format_](found)
    )
