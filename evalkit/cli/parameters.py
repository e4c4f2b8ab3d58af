"""Types of command-line values: texts that are not empty, as of a shell variable that is not set; files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evalkit.system.urls import is_url, shown

if TYPE_CHECKING:
    from evalkit.system.storage import Place

__all__ = ["file", "output", "text"]


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
