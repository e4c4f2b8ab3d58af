"""An engine as of workers on other machines, in this process: all travels pickled, and comes in any order."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterable
from typing import Any


class Elsewhere:
    """Has a few items in hand, and does the last of them first.

    Args:
        workers: How many there are; each has its own copy of the work, and does every so-manyth item.
        at_once: How many items are in hand.
        dies_at: Numbers of items at whose end the worker dies: the result is lost, another does it again.
    """

    def __init__(self, workers: int = 2, at_once: int = 3, dies_at: Iterable[int] = ()) -> None:
        self.workers = workers
        self.at_once = at_once
        self.dies_at = set(dies_at)
        self.works: list[Any] = []
        self.done: list[Any] = []
        """The items in the order in which they were done."""

    def map(
        self, work: Any, items: Iterable[Any], report: Callable[[float], object] | None = None
    ) -> Generator[tuple[int, Any], None, None]:
        pickled = pickle.dumps(work)
        begins: dict[int, Any] = {}
        parts: dict[int, float] = {}
        hand: list[tuple[int, bytes]] = []
        numbered = enumerate(items)

        def pulse(number: int, done: float) -> None:
            parts[number] = done
            if report is not None:
                report(sum(parts.values()))

        self.works.append(work)
        while True:
            while len(hand) < self.at_once and (taken := next(numbered, None)):
                hand.append((taken[0], pickle.dumps(taken[1])))
            if not hand:
                return
            number, sent = hand.pop()
            item, worker = pickle.loads(sent), number % self.workers
            if worker not in begins:
                begins[worker] = pickle.loads(pickled).prepare()
            pending = begins[worker](item, lambda done, number=number: pulse(number, done))
            result = pickle.dumps(pending.result())
            self.done.append(item)
            if number in self.dies_at:
                self.dies_at.remove(number)
                pulse(number, 0.0)
                del begins[worker]
                hand.append((number, sent))
                continue
            yield number, pickle.loads(result)
