"""Works for tests of engines. An item says by name what to do, and with what."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from patience import until

from evalkit.errors import InputError
from evalkit.system.engine import Done, Pending, Pulse


class Order(NamedTuple):
    do: str
    number: int = 0
    path: Path = Path()


class UnpicklableError(Exception):
    """Whose unpickling fails, as that of many libraries' errors."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@dataclass(frozen=True)
class Orders:
    name: str = "orders"
    device: str = "cpu"
    dies_if_there: Path | None = None
    refuses: bool = False

    def prepare(self) -> Callable[[Order, Pulse], Pending[Any]]:
        if self.refuses:
            raise InputError("no such images")
        if self.dies_if_there is not None and self.dies_if_there.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return _begin


@dataclass(frozen=True)
class Overlapping:
    """Whose item 0 has no result before item 1 is begun."""

    folder: Path
    name: str = "overlapping"
    device: str = "cpu"

    def prepare(self) -> Callable[[int, Pulse], Pending[int]]:
        return self._begin

    def _begin(self, number: int, pulse: Pulse) -> Pending[int]:
        (self.folder / f"begun {number}").touch()
        if number == 0:
            until((self.folder / "both are given").exists)
        return _Later(self.folder, number)


@dataclass(frozen=True)
class _Later:
    folder: Path
    number: int

    def done(self) -> bool:
        return False

    def result(self) -> int:
        until((self.folder / "begun 1").exists)
        return self.number


def _begin(order: Order, pulse: Pulse) -> Pending[Any]:
    pulse(order.number / 2)
    result = _ORDERS[order.do](order)
    pulse(order.number)
    return Done(result)


def _is_first_try(order: Order) -> bool:
    """In the folder ``path``. The first one waits there until its progress has been seen."""
    try:
        (order.path / "tried").touch(exist_ok=False)
    except FileExistsError:
        return False
    until((order.path / "seen").exists)
    return True


def _square(order: Order) -> dict[str, Any]:
    return {"square": np.full(1000, order.number) ** 2, "number": order.number}


def _where(order: Order) -> dict[str, Any]:
    import torch

    return {
        "pid": os.getpid(),
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
        "niceness": os.nice(0),
        "RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED"),
    }


def _meet(order: Order) -> dict[str, Any]:
    """Ends when ``number`` workers are here at the same time."""
    (order.path / str(os.getpid())).touch()
    until(lambda: len(list(order.path.iterdir())) >= order.number)
    return _where(order)


def _wait(order: Order) -> int:
    """Until the path is there."""
    until(order.path.exists)
    return order.number


def _stop_once(order: Order) -> int:
    if _is_first_try(order):
        os.kill(os.getpid(), signal.SIGSTOP)
    return order.number


def _hang_once(order: Order) -> int:
    while _is_first_try(order):
        threading.Event().wait()
    return order.number


def _hold_once(order: Order) -> int:
    """Keeps the interpreter's lock, as a C extension that hangs does."""
    if _is_first_try(order):
        import ctypes

        ctypes.PyDLL(None).pause()
    return order.number


def _die(order: Order) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(order: Order) -> None:
    raise InputError(f"image {order.number} is bad")


def _break(order: Order) -> None:
    raise ValueError(f"number {order.number}")


def _break_oddly(order: Order) -> None:
    raise UnpicklableError("one", "two")


def _exit(order: Order) -> None:
    raise SystemExit(order.number)


_ORDERS: dict[str, Callable[[Order], Any]] = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        _square,
        _where,
        _meet,
        _wait,
        _stop_once,
        _hang_once,
        _hold_once,
        _die,
        _refuse,
        _break,
        _break_oddly,
        _exit,
    )
}
