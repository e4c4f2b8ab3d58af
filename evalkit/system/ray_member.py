"""A worker, as the engine of Ray sees it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from evalkit.system.engine import WorkerState
from evalkit.system.ray_worker import Place

__all__ = ["LOADING", "Call", "Member"]

LOADING = -1
# While a faster item's result travels, the worker does the next one.
QUICK_SECONDS = 2.0
RATE_LOOKS = 30


@dataclass
class Call:
    """An item; with the index LOADING, a work to load."""

    index: int
    pickled: bytes
    tries: int = 0


@dataclass(eq=False)
class Member:
    """A worker, as the engine sees it."""

    actor: Any
    hello: Any
    device: str
    deaths: int
    """How many before it, in whose place it is, died while they loaded."""
    place: Place | None = None
    work: bytes = b""
    """Pickled, if it is loaded."""
    calls: dict[Any, Call] = field(default_factory=dict)
    """What it has not answered, in order, by Ray's reference."""
    given: int = 0
    """Calls so far."""
    look: Any = None
    changes: int = -1
    parts: dict[int, float] = field(default_factory=dict)
    """How much of its items is done."""
    finished: float = 0.0
    seconds: float = QUICK_SECONDS
    """That the last item took."""
    quiet: float = 0.0
    """Seconds without progress, of those in which the engine watched."""
    totals: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RATE_LOOKS))

    def who(self) -> str:
        """What it is called in messages."""
        return f"worker {self.place.host} (pid {self.place.pid})" if self.place else "a worker"

    def room(self) -> int:
        """How many more items it may be given."""
        return (2 if self.seconds < QUICK_SECONDS else 1) - len(self.calls)

    def is_loading(self) -> bool:
        """Whether it starts or loads."""
        return self.place is None or any(call.index == LOADING for call in self.calls.values())

    def items(self) -> list[Call]:
        """Those that it has in hand."""
        return [call for call in self.calls.values() if call.index != LOADING]

    def forget(self) -> None:
        """What is only true of the work that it had loaded."""
        self.work, self.finished, self.seconds = b"", 0.0, QUICK_SECONDS
        self.totals.clear()

    def state(self, name: str = "") -> WorkerState:
        """For those who watch; ``name`` in place of the state that is seen here."""
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
