"""The verb that puts records side by side: table."""

from __future__ import annotations

from pathlib import Path

import click

from evalkit.cli.parameters import file
from evalkit.cli.records import record_at
from evalkit.errors import InputError

__all__ = ["table"]


@click.command()
@click.argument("records", nargs=-1, required=True, type=file)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "markdown", "csv", "json"]),
    default="table",
    show_default=True,
    help="How to show them.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse, with exit code 2, if any values may not stand side by side. By default they are marked.",
)
def table(records: tuple[Path, ...], format_: str, strict: bool) -> None:
    """Put the scores of RECORDS into one table, and mark what may not stand side by side, and why.

    A record is what `evalkit compare --json` wrote, of one or several sets of samples, or a folder that
    `evalkit sweep` has filled, or the results.json in it.

    \b
    Example:
      evalkit table a.json b.json runs/s
      evalkit table a.json b.json --format markdown --strict
    """
    from evalkit.report.records import FORMATS, Records
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
            f"These records may not stand side by side: {first}.{more} Without --strict they are shown, with "
            "marks."
        )
    click.echo(FORMATS[format_](found))
