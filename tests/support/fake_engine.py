"""An engine whose workers are as if elsewhere: what goes to them and back is pickled, and order is lost."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Generator, Iterable
from typing import Any


class FakeEngine:
    """Does the items of several workers in this process, in a random order.

    Args:
        workers: How many items are in hand at a time.
        dies_at: Numbers of items whose first result is lost, as where its worker dies at its end.
        seed: Of the order.
    """

    def __init__(self, workers: int = 3, *, dies_at: Iterable[int] = (), seed: int = 0) -> None:
        self.workers = workers
        self.maps: list[list[int]] = []
        """The numbers of the items of each map, in the order in which they were done."""
        self.works: list[Any] = []
        """Of each map."""
        self.items: list[Any] = []
        """Of all maps, in the order in which they were done."""
        self._dies_at = set(dies_at)
        self._chance = random.Random(seed)

    def map(
        self, work: Any, items: Iterable[Any], report: Callable[[float], object] | None = None
    ) -> Generator[tuple[int, Any], None, None]:
        recipe, order = pickle.dumps(work), list[int]()
        self.maps.append(order)
        self.works.append(work)
        begins = [pickle.loads(recipe).prepare() for _ in range(self.workers)]
        source, hand, parts = enumerate(items), dict[int, bytes](), dict[int, float]()

        def pulse(index: int, done: float) -> None:
            parts[index] = done
            if report is not None:
                report(sum(parts.values()))

        while True:
            while len(hand) < self.workers and (taken := next(source, None)):
                hand[taken[0]] = pickle.dumps(taken[1])
            if not hand:
                return
            index = self._chance.choice(sorted(hand))
            begin = self._chance.choice(begins)
            item = pickle.loads(hand[index])
            result = begin(item, lambda done, index=index: pulse(index, done)).result()
            order.append(index)
            self.items.append(item)
            if index in self._dies_at:
                self._dies_at.remove(index)
                pulse(index, 0.0)
                begins[begins.index(begin)] = pickle.loads(recipe).prepare()
                continue
            del hand[index]
            yield index, pickle.loads(pickle.dumps(result))
