"""Progress on a terminal; silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from evalkit.system.processes import is_main_process

if TYPE_CHECKING:
    from evalkit.system.progress import Progress

__all__ = ["progress_bars"]


def progress_bars(*, in_bytes: bool = False) -> Progress:
    """Bars with rate and time left, one for the stage at work, on the main process's terminal.

    Args:
        in_bytes: Stages count bytes, as downloads do.
    """
    if not (is_main_process() and sys.stderr is not None and sys.stderr.isatty()):
        return _silent
    return _on_terminal(in_bytes)


def _silent(stage: str, done: int, total: int) -> None:
    """Does nothing: there is no terminal."""


def _on_terminal(in_bytes: bool) -> Callable[[str, int, int], None]:
    from rich import progress
    from rich.console import Console

    amount: list[progress.ProgressColumn] = (
        [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        if in_bytes
        else [progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[rate]}")]
    )
    bars: dict[str, progress.Progress] = {}

    def stop() -> None:
        for bar in bars.values():
            bar.stop()
        bars.clear()

    def report(stage: str, done: int, total: int) -> None:
        is_over = bool(total) and done >= total
        if stage not in bars:
            stop()
            if is_over:
                return  # nothing to do, such as features that are all in the store
            bars[stage] = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                *amount,
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            bars[stage].add_task(stage, total=total or None, completed=done, rate="")
            bars[stage].start()
        task = bars[stage].tasks[0]
        rate = f"{task.speed:,.1f}/s" if task.speed else ""
        bars[stage].update(task.id, completed=done, rate=rate)
        if is_over:
            stop()

    return report
