"""Progress on a terminal: a bar for the stage at work, and below it what the workers are doing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from evalkit.system.engine import WorkerState
from evalkit.system.progress import Stage

__all__ = ["Bars"]

MOST_LINES = 16


class Bars:
    """A bar with rate and time left, and a line for each worker, or for each host where there are many."""

    def __init__(
        self, console: Console, *, in_bytes: bool = False, clock: Callable[[], float] = time.monotonic
    ):
        self._console = console
        self._in_bytes = in_bytes
        self._clock = clock
        self._stages: dict[str, Stage] = {}
        self._stage: Stage | None = None
        self._workers: Sequence[WorkerState] = ()
        self._live: Live | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show this stage, in place of another."""
        state = self._stages.setdefault(stage, Stage(stage, done, total))
        state.update(done, total, self._clock())
        if state.is_over:  # perhaps from the beginning, such as features that are all in the store
            del self._stages[stage]
            self.close()
            return
        self._stage = state
        if self._live is None:
            self._live = Live(
                get_renderable=self.render, console=self._console, transient=True, refresh_per_second=4
            )
            self._live.start(refresh=True)

    def watch(self, workers: Sequence[WorkerState]) -> None:
        """Show these workers below the bar from now on."""
        self._workers = workers

    def close(self) -> None:
        """Take everything off the screen."""
        self._stage = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def render(self) -> RenderableType:
        """What is shown now."""
        if self._stage is None:
            return ""
        return Group(self._bar(self._stage), _lines(self._workers))

    def _bar(self, stage: Stage) -> RenderableType:
        amount, rate, left = stage.figures(self._clock(), in_bytes=self._in_bytes)
        row = _table(5, narrowed=(0, 1))
        row.columns[1].max_width = 40
        row.add_row(
            Text(stage.name, no_wrap=True, overflow="ellipsis"),
            ProgressBar(total=stage.total or None, completed=stage.done),
            Text(amount),
            Text(rate, style="progress.data.speed"),
            Text(left, style="progress.remaining"),
        )
        return row


def _lines(workers: Sequence[WorkerState]) -> RenderableType:
    if len(workers) <= MOST_LINES:
        table = _table(5)
        for worker in workers:
            item = "" if worker.item is None else f"item {worker.item:,}"
            table.add_row(*map(Text, (worker.host, worker.device, worker.state, item, _rate([worker]))))
        return table
    hosts: dict[str, list[WorkerState]] = {}
    for worker in workers:
        hosts.setdefault(worker.host or "elsewhere", []).append(worker)
    if len(hosts) > MOST_LINES:
        shown = [*hosts][: MOST_LINES - 1]
        rest = [worker for host, group in hosts.items() if host not in shown for worker in group]
        hosts = {host: hosts[host] for host in shown} | {f"{len(hosts) - len(shown):,} more hosts": rest}
    table = _table(3)
    for host, group in hosts.items():
        table.add_row(*map(Text, (host, _states(group), _rate(group))))
    return table


def _table(columns: int, narrowed: Sequence[int] = ()) -> Table:
    """For rows of one line; on a narrow terminal, some columns become narrower."""
    table = Table.grid(padding=(0, 1))
    for column in range(columns):
        table.add_column(no_wrap=column not in narrowed)
    return table


def _states(workers: Sequence[WorkerState]) -> str:
    """How many workers are in each state: ``7 working, 1 starting``."""
    counts = Counter(worker.state for worker in workers)
    return ", ".join(f"{count:,} {state}" for state, count in counts.most_common())


def _rate(workers: Sequence[WorkerState]) -> str:
    rate = sum(worker.rate for worker in workers)
    return f"{rate:,.1f}/s" if rate else ""
