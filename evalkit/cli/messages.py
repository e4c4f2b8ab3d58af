"""What the packages log, and errors, on standard error: as text, or as lines of JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
from typing import Any

from evalkit.system.processes import is_main_process, rank, world_size

__all__ = ["is_json", "say", "say_json", "show_messages", "terminal_width"]

LOGGERS = ("evalkit", "generation", "reference_batches")


class _Handler(logging.Handler):
    """Writes messages to standard error."""

    as_json = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            say(text if is_main_process() else f"[rank {rank()} of {world_size()}] {text}")
        except Exception:  # as logging's own handlers: a message that cannot be shown stops no work
            self.handleError(record)


_HANDLER = _Handler()


def show_messages(*, as_json: bool = False) -> None:
    """Print what the packages log: everything on the main process, warnings on the others of `evalkit train`.

    There is one handler however often this is called.

    Args:
        as_json: From now on, all lines on standard error are JSON, as ``--progress json`` asks.
    """
    _HANDLER.as_json = as_json
    _HANDLER.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if _HANDLER not in logger.handlers:
            logger.addHandler(_HANDLER)


def is_json() -> bool:
    """Whether the lines on standard error are JSON."""
    return _HANDLER.as_json


def say(text: str, kind: str = "message") -> None:
    """Print a message to standard error, above the bars: as it is, or as ``{"message": text}``."""
    if is_json():
        say_json({kind: text})
    else:
        _print(text)


def say_json(content: dict[str, Any]) -> None:
    """Print a line of JSON to standard error."""
    _print(json.dumps(content))


def terminal_width() -> int | None:
    """Width of the terminal in characters; None if standard output is not a terminal."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else None


def _print(line: str) -> None:
    # Not by click.echo: it writes past what rich puts in the place of standard error while bars are shown.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # there is nowhere left to say it
            print(line, file=sys.stderr, flush=True)
