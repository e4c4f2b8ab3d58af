"""What the packages log, shown on the command line."""

from __future__ import annotations

import logging

import click

from evalkit.system.processes import is_main_process, rank, world_size

__all__ = ["show_messages"]

LOGGERS = ("evalkit", "generation", "reference_batches")


class _Handler(logging.Handler):
    """Writes messages as plain text to standard error, where click and its tests expect it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            click.echo(text if is_main_process() else f"[rank {rank()} of {world_size()}] {text}", err=True)
        except Exception:  # as logging's own handlers: a message that cannot be shown stops no work
            self.handleError(record)


_HANDLER = _Handler()


def show_messages() -> None:
    """Print what the packages log: everything on the main process, warnings on the others.

    There is one handler however often this is called.
    """
    _HANDLER.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if _HANDLER not in logger.handlers:
            logger.addHandler(_HANDLER)
