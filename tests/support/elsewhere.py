"""An engine as of workers on other machines, in this process: all travels pickled, and comes in any order."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any


class Elsewhere:
    """Takes a few items at a time, and does the last of them first.

    Args:
        workers: How many there are; each has its own copy of the work, and does every so-manyth item.
        at_once: How many items are taken before the first result comes.
    """

    def __init__(self, workers: int = 2, at_once: int = 3) -> None:
        self.workers = workers
        self.at_once = at_once
        self.works: list[Any] = []
        self.done: list[Any] = []
        """The items in the order in which they were done."""

    def map(
        self, work: Any, items: Iterable[Any], report: Callable[[float], object] | None = None
    ) -> Generator[tuple[int, Any], None, None]:
        pickled = pickle.dumps(work)
        begins: dict[int, Any] = {}
        parts: dict[int, float] = {}
        numbered = enumerate(items)

        def pulse(number: int, done: float) -> None:
            parts[number] = done
            if report is not None:
                report(sum(parts.values()))

        self.works.append(work)
        while taken := [*islice(numbered, self.at_once)]:
            for number, item in reversed(taken):
                worker = number % self.workers
                if worker not in begins:
                    begins[worker] = pickle.loads(pickled).prepare()
                item = pickle.loads(pickle.dumps(item))
                pending = begins[worker](item, lambda done, number=number: pulse(number, done))
                self.done.append(item)
                yield number, pickle.loads(pickle.dumps(pending.result()))
