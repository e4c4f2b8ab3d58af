"""Engines run the items of a long job: in this process, or in workers on several machines."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

__all__ = ["Done", "Engine", "Inline", "Pending", "Pulse", "Work", "WorkerState"]

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)
Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)

Pulse: TypeAlias = Callable[[float], object]
"""Called with the amount of an item that is done, in the unit of the job's progress, such as images."""


class Pending(Protocol[ResultOut]):
    """A result that a device may still be computing."""

    def done(self) -> bool:
        """Whether :meth:`result` would return without waiting."""

    def result(self) -> ResultOut:
        """The result; waits until it is available."""


class Done(Generic[Result]):
    """A result that is already available."""

    def __init__(self, value: Result) -> None:
        self._value = value

    def done(self) -> bool:
        """True."""
        return True

    def result(self) -> Result:
        """The result."""
        return self._value


class Work(Protocol[ItemIn, ResultOut]):
    """The function applied to each item, as a small frozen dataclass.

    Remote workers receive it pickled, so its fields pickle as recipes: images as their location and digest,
    networks as their weights, or as a file and its digest. Items and results are pickled by value.

    Results must depend bit for bit on the work and the item alone. Splits, batch sizes and numbers of threads
    are part of them, and never chosen by the worker.

    Attributes:
        name: Name in messages, such as ``"features of samples.npz"``.
        device: Device of its networks in this process: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. A worker
            uses the same type of device.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above
    @property
    def device(self) -> str: ...  # noqa: D102

    def prepare(self) -> Callable[[ItemIn, Pulse], Pending[ResultOut]]:
        """Open inputs and load networks, once per process; returns a function that processes one item.

        If a device runs ahead, an item's result may still be pending when the next item is started.

        Raises:
            EvalkitError: Inputs are missing, or differ from the caller's.
        """


@dataclass(frozen=True)
class WorkerState:
    """Status of a remote worker.

    Attributes:
        host: Host name; empty until the worker has started.
        pid: Process ID on that host; 0 until the worker has started.
        device: ``cpu``, ``cuda:N`` in the host's numbering, or ``mps``.
        state: ``starting`` (or waiting for a free device), ``loading``, ``working``, ``idle`` or ``lost``.
        item: Number of the current item.
        done: Amount of the current item that is done, in the unit of the pulses.
        rate: Amount per second, over the last half minute.
    """

    host: str
    pid: int
    device: str
    state: str
    item: int | None
    done: float
    rate: float


class Engine(Protocol):
    """Runs items of work. Results do not depend on which worker runs which item."""

    def map(
        self,
        work: Work[Item, Result],
        items: Iterable[Item],
        report: Callable[[float], object] | None = None,
    ) -> Generator[tuple[int, Result], None, None]:
        """Yield the number of each item and its result, in order of completion.

        Closing the iterator abandons unfinished items.

        Args:
            work: Processes an item.
            items: Taken one at a time when a worker is free, so later items may depend on earlier results.
            report: Called with the total amount done of all items so far, including unfinished ones: the sum
                of their pulses. It may decrease if a worker dies.

        Raises:
            EvalkitError: The work raised it. Any error of the work is raised at once.
            WorkerError: An item failed several times.
        """


class Inline:
    """Runs all items in this process."""

    def map(
        self,
        work: Work[Item, Result],
        items: Iterable[Item],
        report: Callable[[float], object] | None = None,
    ) -> Generator[tuple[int, Result], None, None]:
        """Yield results in order. If a device runs ahead, the next item starts before a result is awaited.

        After an error or an interruption, results of items started earlier are yielded first.
        """
        begin: Callable[[Item, Pulse], Pending[Any]] | None = None
        finished = 0.0
        parts: dict[int, float] = {}
        ahead: deque[tuple[int, Pending[Result]]] = deque()

        def pulse_of(index: int) -> Pulse:
            def pulse(done: float) -> None:
                parts[index] = done
                if report is not None:
                    report(finished + sum(parts.values()))

            return pulse

        try:
            for index, item in enumerate(items):
                begin = begin or work.prepare()
                ahead.append((index, begin(item, pulse_of(index))))
                while ahead and (ahead[0][1].done() or len(ahead) > 1):
                    number, pending = ahead.popleft()
                    result = pending.result()
                    finished += parts.pop(number, 0.0)
                    yield number, result
        except GeneratorExit:
            return
        except BaseException:
            yield from ((number, pending.result()) for number, pending in ahead)
            raise
        yield from ((number, pending.result()) for number, pending in ahead)
