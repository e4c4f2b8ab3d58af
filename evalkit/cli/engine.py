"""The options of verbs that do long work: who does it, and how its progress is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from evalkit.cli.messages import show_messages
from evalkit.cli.progress import progress_bars
from evalkit.errors import InputError

if TYPE_CHECKING:
    from evalkit.system.engine import Engine
    from evalkit.system.progress import Progress

__all__ = ["engine_options", "open_engine"]

F = TypeVar("F", bound=Callable[..., Any])


def engine_options(command: F) -> F:
    """``--engine``, which the command gets as ``engine``; and ``--progress``, which acts by itself."""
    options = [
        click.option(
            "--engine",
            metavar="inline|ray|ray=ADDRESS",
            default="inline",
            show_default=True,
            help="Who does the work: this process; with ray, a worker on each GPU of this machine; with an "
            "ADDRESS such as HOST:6379, those of a Ray cluster.",
        ),
        click.option(
            "--progress",
            type=click.Choice(["auto", "json"]),
            default="auto",
            show_default=True,
            # Errors of what is checked first are JSON, too.
            is_eager=True,
            expose_value=False,
            callback=_json_from_now_on,
            help="auto: bars on a terminal. json: all of standard error is lines of JSON, about one a second "
            "and one for each message (docs/clusters.md).",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _json_from_now_on(context: click.Context, parameter: click.Parameter, value: str) -> None:
    del context, parameter
    show_messages(as_json=value == "json")


@contextmanager
def open_engine(engine: str) -> Iterator[tuple[Engine, Progress]]:
    """The engine that ``--engine`` names, while the block runs, and what shows its progress.

    Raises:
        InputError: There is no such engine, or it cannot be started.
        MissingDependencyError: Ray is not installed.
    """
    kind, has_address, address = engine.partition("=")
    if engine == "inline":
        from evalkit.system.engine import Inline

        yield Inline(), progress_bars()
        return
    if kind != "ray" or (has_address and not address.strip()):
        raise InputError(
            f"--engine {engine}: expected inline, ray for the GPUs of this machine, or ray=HOST:PORT for a "
            "Ray cluster that is running."
        )
    from evalkit.system.ray_engine import ray_engine

    view = progress_bars()
    with ray_engine(address.strip() or None, watch=view.watch) as workers:
        yield workers, view
