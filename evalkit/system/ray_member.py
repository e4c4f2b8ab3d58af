"""A worker, from the point of view of the Ray engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from evalkit.system.engine import WorkerState
from evalkit.system.ray_worker import Place

__all__ = ["LOADING", "Call", "Member"]

LOADING = -1
# If items are faster than this, a worker gets two, so that it is busy while a result is sent.
QUICK_SECONDS = 2.0
RATE_LOOKS = 30


@dataclass
class Call:
    """An item; with index LOADING, a work to load."""

    index: int
    pickled: bytes
    tries: int = 0


@dataclass(eq=False)
class Member:
    """The engine's state of a worker."""

    actor: Any
    hello: Any
    device: str
    deaths: int
    """Number of predecessors that died while loading."""
    place: Place | None = None
    work: bytes = b""
    """The loaded work, pickled."""
    calls: dict[Any, Call] = field(default_factory=dict)
    """Unanswered calls in order, by Ray reference."""
    given: int = 0
    """Number of calls so far."""
    look: Any = None
    changes: int = -1
    parts: dict[int, float] = field(default_factory=dict)
    """Amount done, by item."""
    finished: float = 0.0
    seconds: float = QUICK_SECONDS
    """Duration of the last item."""
    quiet: float = 0.0
    """Seconds without progress, counted only while the engine was polling."""
    totals: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RATE_LOOKS))

    def who(self) -> str:
        """Name in messages."""
        return f"worker {self.place.host} (pid {self.place.pid})" if self.place else "a worker"

    def room(self) -> int:
        """Number of further items that it can take."""
        return (2 if self.seconds < QUICK_SECONDS else 1) - len(self.calls)

    def is_loading(self) -> bool:
        """Whether it is starting or loading."""
        return self.place is None or any(call.index == LOADING for call in self.calls.values())

    def items(self) -> list[Call]:
        """Its unfinished items."""
        return [call for call in self.calls.values() if call.index != LOADING]

    def forget(self) -> None:
        """Reset what applies only to the work that was loaded."""
        self.work, self.finished, self.seconds = b"", 0.0, QUICK_SECONDS
        self.totals.clear()

    def state(self, name: str = "") -> WorkerState:
        """The state for ``watch``; ``name`` overrides the state as seen by the engine."""
        item = next(iter(self.items()), None)
        rate = 0.0
        if len(self.totals) > 1:
            (begun, before), (now, after) = self.totals[0], self.totals[-1]
            rate = max(0.0, after - before) / (now - begun)
        if not name:
            busy = "loading" if self.is_loading() else "working" if item else "idle"
            name = busy if self.place else "starting"
        return WorkerState(
            host=self.place.host if self.place else "",
            pid=self.place.pid if self.place else 0,
            device=f"cuda:{self.place.gpu}" if self.device == "cuda" and self.place else self.device,
            state=name,
            item=item.index if item else None,
            done=self.parts.get(item.index, 0.0) if item else 0.0,
            rate=rate,
        )
