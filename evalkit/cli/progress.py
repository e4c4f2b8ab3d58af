"""Progress on standard error: bars on a terminal, lines of text elsewhere, lines of JSON for scripts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import click

from evalkit.cli.messages import is_json, say, say_json
from evalkit.system.engine import WorkerState
from evalkit.system.processes import is_main_process
from evalkit.system.progress import Stage

__all__ = ["Lines", "Silence", "Texts", "View", "progress_bars"]

BETWEEN_LINES = 0.95  # seconds: workers are watched about once a second
BETWEEN_TEXTS = 10.0  # seconds, and a tenth of a stage's time so far: a log is read later, and as a whole


class View(Protocol):
    """Shows progress, and what workers are doing."""

    def __call__(self, stage: str, done: int, total: int) -> object:
        """Show a stage: see :data:`evalkit.system.progress.Progress`."""

    def watch(self, workers: Sequence[WorkerState]) -> None:
        """Show what each worker is doing; called about once a second."""

    def close(self) -> None:
        """Take everything off the screen."""


def progress_bars(*, in_bytes: bool = False) -> View:
    """What shows progress until the command ends: bars on a terminal, else lines of text; JSON if asked for.

    All have rate and time left. Only the main process shows bars or lines of text.

    Args:
        in_bytes: Stages count bytes, as downloads do, not images.
    """
    view: View
    if is_json():
        view = Lines(in_bytes=in_bytes)
    elif not is_main_process() or sys.stderr is None:
        view = Silence()
    elif sys.stderr.isatty():
        from rich.console import Console

        from evalkit.cli.bars import Bars

        view = Bars(Console(stderr=True), in_bytes=in_bytes)
    else:
        view = Texts(in_bytes=in_bytes)
    if context := click.get_current_context(silent=True):
        context.call_on_close(view.close)  # before an error is shown
    return view


class Silence:
    """Shows nothing."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Does nothing."""

    def watch(self, workers: Sequence[WorkerState]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Texts:
    """A line every 10 seconds or less often, for output that goes to a file or a pipe."""

    def __init__(self, *, in_bytes: bool = False, clock: Callable[[], float] = time.monotonic):
        self._in_bytes = in_bytes
        self._clock = clock
        self._stages: dict[str, Stage] = {}
        self._began: dict[str, float] = {}
        self._next: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Print a line, if the stage has been going on for long enough since the last."""
        now = self._clock()
        if stage not in self._stages:
            self._stages[stage] = Stage(stage, done, total)
            self._began[stage], self._next[stage] = now, now + BETWEEN_TEXTS
        state = self._stages[stage]
        state.update(done, total, now)
        if now >= self._next[stage]:
            say(f"{stage}: {', '.join(filter(None, state.figures(now, in_bytes=self._in_bytes)))}")
            self._next[stage] = now + max(BETWEEN_TEXTS, (now - self._began[stage]) / 10)
        if state.is_over:
            del self._stages[stage]

    def watch(self, workers: Sequence[WorkerState]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Lines:
    """A line of JSON about once a second, and at the beginning and the end of each stage."""

    def __init__(self, *, in_bytes: bool = False, clock: Callable[[], float] = time.monotonic):
        self._rate = "bytes_per_second" if in_bytes else "images_per_second"
        self._clock = clock
        self._stages: dict[str, Stage] = {}
        self._stage: Stage | None = None
        self._workers: Sequence[WorkerState] = ()
        self._printed = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Print a line, if it is time to."""
        is_new = stage not in self._stages
        state = self._stages.setdefault(stage, Stage(stage, done, total))
        state.update(done, total, self._clock())
        self._print(state, at_once=is_new or state.is_over)
        if state.is_over:
            del self._stages[stage]
        self._stage = None if state.is_over else state

    def watch(self, workers: Sequence[WorkerState]) -> None:
        """Print a line, if it is time to."""
        self._workers = workers
        if self._stage is not None:
            self._print(self._stage)

    def close(self) -> None:
        """Does nothing."""

    def _print(self, stage: Stage, *, at_once: bool = False) -> None:
        now = self._clock()
        if not at_once and now < self._printed + BETWEEN_LINES:
            return
        self._printed = now
        say_json(
            {
                "stage": stage.name,
                "done": stage.done,
                "total": stage.total or None,
                self._rate: _rounded(stage.per_second(now)),
                "seconds_left": _rounded(stage.seconds_left(now)),
                "workers": [
                    {
                        "host": worker.host,
                        "pid": worker.pid,
                        "device": worker.device,
                        "state": worker.state,
                        "item": worker.item,
                        "images_per_second": _rounded(worker.rate or None),
                    }
                    for worker in self._workers
                ],
            }
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
