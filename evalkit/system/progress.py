"""Progress callbacks, and how fast a stage is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TypeAlias

__all__ = ["Progress", "Stage"]

Progress: TypeAlias = Callable[[str, int, int], object]
"""Called with ``(stage, done, total)`` at the start of a stage and after every step of it.

``done`` and ``total`` count in one unit (images, bytes, rows, steps); ``total`` is 0 where it is not known.
Stages may alternate; a stage is over when ``done`` reaches ``total``. ``done`` may go down, where a worker
has died.
"""

WINDOW_SECONDS = 30.0
SETTLING_SECONDS = 3.0
FEWEST_STEPS = 4


class Stage:
    """How much of a stage is done, and how fast it has been in the last half minute.

    What was done when it began does not count: it came from an earlier run. Nor does the time before the
    first step, in which networks are loaded, nor the seconds after it, in which workers end what they began
    together. Where steps take long, the last four count.

    Attributes:
        name: What is done.
        done: How much is done.
        total: How much there is; 0 where it is not known.
    """

    def __init__(self, name: str, done: int, total: int):
        self.name = name
        self.done = done
        self.total = total
        self._settled = float("inf")
        self._steps: deque[tuple[float, int]] = deque()

    @property
    def is_over(self) -> bool:
        """Whether all is done."""
        return 0 < self.total <= self.done

    def update(self, done: int, total: int, now: float) -> None:
        """So much is done at ``now``, in seconds of any clock."""
        self.total = total
        if done == self.done:
            return
        self.done = done
        self._settled = min(self._settled, now + SETTLING_SECONDS)
        if now < self._settled:
            self._steps = deque()  # another thread may be looking at the one that was
        self._steps.append((now, done))
        while len(self._steps) > FEWEST_STEPS + 1 and self._steps[1][0] <= now - WINDOW_SECONDS:
            self._steps.popleft()

    def per_second(self, now: float) -> float | None:
        """How much is done in a second, above 0; None where that is not known yet."""
        steps = self._steps
        if len(steps) < 2:
            return None
        (first, before), (last, after) = steps[0], steps[-1]
        usual = (last - first) / (len(steps) - 1)
        seconds = max(last - first, now - first - usual)  # more, where the next step is overdue
        if now - first < SETTLING_SECONDS or after <= before:
            return None
        return (after - before) / seconds

    def seconds_left(self, now: float) -> float | None:
        """Time until all is done; None where that is not known."""
        rate = self.per_second(now)
        return (self.total - self.done) / rate if rate and self.total >= self.done else None

    def figures(self, now: float, *, in_bytes: bool) -> tuple[str, str, str]:
        """``1,300/5,000``, ``10.0/s`` and ``0:06:10 left``; the last two empty where they are not known."""

        def amount(value: float) -> str:
            if in_bytes:
                from rich import filesize

                return filesize.decimal(round(value))
            return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"

        rate, left = self.per_second(now), self.seconds_left(now)
        return (
            f"{amount(self.done)}/{amount(self.total) if self.total else '?'}",
            "" if rate is None else f"{amount(rate)}/s",
            "" if left is None else f"{timedelta(seconds=round(left))} left",
        )
