"""Ctrl-C that lets the current piece of work finish."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["defer_sigint"]

logger = logging.getLogger(__name__)


@contextmanager
def defer_sigint(work: str) -> Iterator[Callable[[], bool]]:
    """Record the first Ctrl-C and let the block continue; the second raises KeyboardInterrupt.

    Args:
        work: What is finished first, for the message: ``"the current shard"``.

    Yields:
        A function that says whether Ctrl-C was pressed; the block stops when it suits.
    """
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        logger.info("Interrupted: finishing %s. Press Ctrl-C again to stop at once.", work)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals go to the main thread
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
