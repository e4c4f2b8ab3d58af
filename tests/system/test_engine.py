"""The engine that is this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from evalkit.errors import InputError
from evalkit.system.engine import Done, Inline, Pending, Pulse


@dataclass
class Device:
    """Ends what it has begun when it is asked for a result, or when a test says so."""

    events: list[str] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Running:
    number: int
    device: Device
    pulse: Pulse

    def done(self) -> bool:
        return self.number in self.device.ended

    def result(self) -> int:
        self.device.events.append(f"result {self.number}")
        self.device.ended.add(self.number)
        self.pulse(10)
        return self.number**2


@dataclass(frozen=True)
class Ahead:
    """On a device that runs ahead."""

    on: Device = field(default_factory=Device)
    name: str = "ahead"
    device: str = "cpu"

    def prepare(self) -> Callable[[int, Pulse], Pending[int]]:
        self.on.events.append("prepare")

        def begin(number: int, pulse: Pulse) -> Pending[int]:
            self.on.events.append(f"begin {number}")
            pulse(4)
            return Running(number, self.on, pulse)

        return begin


@dataclass(frozen=True)
class AtOnce:
    name: str = "at once"
    device: str = "cpu"

    def prepare(self) -> Callable[[int, Pulse], Pending[int]]:
        def begin(number: int, pulse: Pulse) -> Pending[int]:
            if number < 0:
                raise InputError("below 0")
            pulse(1)
            return Done(number**2)

        return begin


def test_results_in_order() -> None:
    assert list(Inline().map(AtOnce(), [3, 1, 2])) == [(0, 9), (1, 1), (2, 4)]


def test_the_next_item_is_begun_before_a_result_is_waited_for() -> None:
    work = Ahead()
    assert list(Inline().map(work, [1, 2, 3])) == [(0, 1), (1, 4), (2, 9)]
    assert work.on.events == [
        "prepare", "begin 1", "begin 2", "result 1", "begin 3", "result 2", "result 3"
    ]  # fmt: skip


def test_what_is_done_is_not_held_back() -> None:
    work = Ahead()
    work.on.ended.update([1, 2])
    results = Inline().map(work, [1, 2])
    assert next(results) == (0, 1)
    assert work.on.events == ["prepare", "begin 1", "result 1"]


def test_items_are_taken_one_at_a_time() -> None:
    known: list[int] = []

    def items() -> Iterator[int]:
        yield 5
        # By then, the result of the one before is known.
        yield known[0]

    for _, result in Inline().map(AtOnce(), items()):
        known.append(result)
    assert known == [25, 625]


def test_no_items_no_preparation() -> None:
    work = Ahead()
    assert list(Inline().map(work, [])) == []
    assert work.on.events == []


def test_reports_are_of_all_items() -> None:
    reports: list[float] = []
    list(Inline().map(Ahead(), [1, 2, 3], reports.append))
    # Each is at 4 when it is begun and at 10 with its result.
    assert reports == [4, 8, 14, 18, 24, 30]


def test_closing_ends_it() -> None:
    work = Ahead()
    results = Inline().map(work, iter([1, 2, 3, 4]))
    assert next(results) == (0, 1)
    results.close()
    assert "begin 3" not in work.on.events


def test_errors_pass_through() -> None:
    results = Inline().map(AtOnce(), [2, -1, 3])
    assert next(results) == (0, 4)
    with pytest.raises(InputError, match=r"^below 0$"):
        next(results)
