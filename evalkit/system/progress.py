"""Progress callbacks, and the speed of a stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TypeAlias

__all__ = ["Progress", "Stage"]

Progress: TypeAlias = Callable[[str, int, int], object]
"""Called with ``(stage, done, total)`` at the start of a stage and after every step of it.

``done`` and ``total`` have the same unit (images, bytes, rows, steps); ``total`` is 0 if unknown. Stages may
alternate; a stage is over when ``done`` reaches ``total``. ``done`` may decrease if a worker dies.
"""

WINDOW_SECONDS = 30.0
SETTLING_SECONDS = 3.0
FEWEST_STEPS = 4


class Stage:
    """Progress of a stage, and its speed over the last half minute.

    The speed excludes work of an earlier run, the time before the first step, in which networks are loaded,
    and the seconds after it, in which workers finish items that they started together. If steps take long,
    the last four are used.

    Attributes:
        name: Name of the stage.
        done: Amount done.
        total: Total amount; 0 if unknown.
    """

    def __init__(self, name: str, done: int, total: int):
        self.name = name
        self.done = done
        self.total = total
        self._settled = float("inf")
        self._steps: deque[tuple[float, int]] = deque()

    @property
    def is_over(self) -> bool:
        """Whether the stage is complete."""
        return 0 < self.total <= self.done

    def update(self, done: int, total: int, now: float) -> None:
        """Record the amount done at time ``now``, in seconds of any clock."""
        self.total = total
        if done == self.done:
            return
        self.done = done
        self._settled = min(self._settled, now + SETTLING_SECONDS)
        if now < self._settled:
            self._steps = deque()  # a new one, because another thread may be reading the old one
        self._steps.append((now, done))
        while len(self._steps) > FEWEST_STEPS + 1 and self._steps[1][0] <= now - WINDOW_SECONDS:
            self._steps.popleft()

    def per_second(self, now: float) -> float | None:
        """Amount per second, above 0; None if not known yet."""
        steps = self._steps
        if len(steps) < 2:
            return None
        (first, before), (last, after) = steps[0], steps[-1]
        usual = (last - first) / (len(steps) - 1)
        seconds = max(last - first, now - first - usual)  # longer if the next step is overdue
        if now - first < SETTLING_SECONDS or after <= before:
            return None
        return (after - before) / seconds

    def seconds_left(self, now: float) -> float | None:
        """Remaining time; None if unknown."""
        rate = self.per_second(now)
        return (self.total - self.done) / rate if rate and self.total >= self.done else None

    def figures(self, now: float, *, in_bytes: bool) -> tuple[str, str, str]:
        """``1,300/5,000``, ``10.0/s`` and ``0:06:10 left``; the last two are empty if unknown."""

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
