"""Types of command-line values: texts that are not empty, as of an unset shell variable; files; runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evalkit.errors import InputError
from evalkit.system.urls import is_url, shown

if TYPE_CHECKING:
    from evalkit.system.storage import Place

__all__ = ["WithRuns", "file", "members_of", "output", "text"]

# No argument of a command can hold it.
_BETWEEN_RUNS = "\0"


def text(value: str) -> str:
    """A text with something in it."""
    if not value.strip():
        raise click.BadParameter("it is empty. Give a value, or leave it out.")
    return value


def file(value: str | Path) -> Path:
    """A path of a file or folder on this machine, there or not; an empty one would be the current folder."""
    if is_url(value):
        raise click.BadParameter(f"{shown(str(value))} is a URL. Give a path on this machine.")
    return Path(text(str(value)))


def output(value: str | Place) -> Place:
    """A file to write: a path on this machine, or a URL such as ``s3://bucket/ref.npz``."""
    from evalkit.system.storage import place_of

    return place_of(text(value) if isinstance(value, str) else value)


class WithRuns(click.Command):
    """A command whose ``--runs`` takes all words up to the next option, which click itself cannot do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See :class:`click.Command`."""
        left, joined = list(args), []
        while left and left[0] != "--":
            joined.append(left.pop(0))
            if joined[-1] == "--runs":
                end = next((i for i, word in enumerate(left) if word.startswith("-")), len(left))
                joined.append(_BETWEEN_RUNS.join(left[:end]))
                del left[:end]
        try:
            return super().parse_args(ctx, joined + left)
        except click.MissingParameter as error:
            if "--runs" not in args:
                raise
            raise click.UsageError(
                "REFERENCE is missing. --runs takes all words up to the next option: "
                "put REFERENCE before it.",
                ctx,
            ) from error


def members_of(runs: str) -> list[str]:
    """What one ``--runs`` names: several runs, or a folder with a file of samples for each.

    Raises:
        InputError: There are none.
    """
    members = [_samples_in(text(run)) for run in runs.split(_BETWEEN_RUNS)] if runs else []
    if not members:
        raise InputError("--runs is followed by no run. Give the runs of one setting, such as a1.npz a2.npz.")
    if len(members) > 1 or is_url(members[0]) or not Path(members[0]).is_dir():
        return members
    folder = Path(members[0])
    # Files side by side, or the folders of `evalkit sample`.
    found = [*folder.glob("*.npz"), *folder.glob("*.h5"), *folder.glob("*/samples_*.npz")]
    if not found:
        raise InputError(
            f"--runs {folder}: no npz or h5 file of samples is in this folder, one for each run. Give the "
            "runs one after another, or such a folder."
        )
    return [str(path) for path in sorted(found)]


def _samples_in(run: str) -> str:
    """The file of samples in a folder of `evalkit sample`; anything else stays as it is."""
    found = [] if is_url(run) else [*Path(run).glob("samples_*.npz")]
    return str(found[0]) if len(found) == 1 else run
