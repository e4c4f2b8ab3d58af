"""Types of command-line values that must not be empty, as from a shell variable that is not set."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["file", "text"]


def text(value: str) -> str:
    """A text with something in it."""
    if not value.strip():
        raise click.BadParameter("it is empty. Give a value, or leave it out.")
    return value


def file(value: str | Path) -> Path:
    """A path of a file or folder, there or not; an empty one would be the current folder."""
    return Path(text(str(value)))
