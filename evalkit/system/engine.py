"""Who does the items of a long job: this process, or workers on many machines."""

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
"""Called with how much of an item is done, in the unit of the job's progress, such as images."""


class Pending(Protocol[ResultOut]):
    """A result that a device may still be computing."""

    def done(self) -> bool:
        """Whether :meth:`result` would not wait."""

    def result(self) -> ResultOut:
        """The result, once it is there."""


class Done(Generic[Result]):
    """A result that is there."""

    def __init__(self, value: Result) -> None:
        self._value = value

    def done(self) -> bool:
        """True."""
        return True

    def result(self) -> Result:
        """The result."""
        return self._value


class Work(Protocol[ItemIn, ResultOut]):
    """What is done with each item: a small frozen dataclass.

    A worker elsewhere gets it pickled. So what it holds pickles as a recipe: images as where they are and
    their digest, networks as their weights or as a file and its digest. Items and results pickle as they are.

    An item decides its result to the bit. Cuts, batch sizes and threads come with the work or the item, never
    from the worker.

    Attributes:
        name: What it is called in messages: ``"features of samples.npz"``.
        device: Where its networks are in this process: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. A worker
            uses the same kind of device.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above
    @property
    def device(self) -> str: ...  # noqa: D102

    def prepare(self) -> Callable[[ItemIn, Pulse], Pending[ResultOut]]:
        """Open inputs and load networks, once in a process; returns what does one item.

        Where a device runs ahead, an item's result may be pending when the next item is begun.

        Raises:
            EvalkitError: The inputs are not there, or are not those that the caller has.
        """


@dataclass(frozen=True)
class WorkerState:
    """What a worker elsewhere is at.

    Attributes:
        host: Name of its machine; empty until it has started.
        pid: Its process there; 0 until it has started.
        device: ``cpu``, ``cuda:N`` by the machine's numbers, or ``mps``.
        state: ``starting`` (also: waits for a free device), ``loading``, ``working``, ``idle`` or ``lost``.
        item: Number of the item that it does.
        done: How much of that item is done, in the unit of the pulses.
        rate: How much it does in a second, over the last half minute.
    """

    host: str
    pid: int
    device: str
    state: str
    item: int | None
    done: float
    rate: float


class Engine(Protocol):
    """Does items of work whose results do not depend on who does which."""

    def map(
        self,
        work: Work[Item, Result],
        items: Iterable[Item],
        report: Callable[[float], object] | None = None,
    ) -> Generator[tuple[int, Result], None, None]:
        """The number of each item and its result, as they come.

        Closing the iterator abandons what is not done.

        Args:
            work: Does an item.
            items: Taken one at a time, when someone is free to do it; so they may depend on what was done.
            report: Called with how much is done of all items taken so far, also in part: the sum of their
                pulses. May go down, where a worker has died.

        Raises:
            EvalkitError: The work raised it; it passes through at once, as any other error of the work does.
            WorkerError: An item had no result after several tries.
        """


class Inline:
    """This process, without any other."""

    def map(
        self,
        work: Work[Item, Result],
        items: Iterable[Item],
        report: Callable[[float], object] | None = None,
    ) -> Generator[tuple[int, Result], None, None]:
        """In order. Where a device runs ahead, the next item is begun before a result is waited for.

        An error, or an interruption, comes after the results of what was begun before.
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
