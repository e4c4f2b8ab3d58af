"""Ctrl-C that lets the piece of work in hand be finished."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["noted_interrupts"]


@contextmanager
def noted_interrupts(say: Callable[[str], object], in_hand: str) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is only noted, the second interrupts; yields whether there was one.

    Args:
        say: Told what the first one does.
        in_hand: What is finished first, in words.
    """
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True
        say(f"Interrupted: finishing {in_hand}. Press Ctrl-C again to stop at once.")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals go to the main thread
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
