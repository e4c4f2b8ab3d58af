"""What runs in a worker of :mod:`evalkit.system.ray_engine`. It does not import Ray."""

from __future__ import annotations

import gc
import os
import pickle
import platform
import queue
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from evalkit import __version__
from evalkit.errors import EvalkitError, WorkerError
from evalkit.system.engine import Done, Pending, Pulse

__all__ = ["Driver", "Failure", "Outcome", "Place", "Worker", "facts"]

# Libraries read these when they are loaded, so they are set before torch and NumPy are.
_OF_THREADS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OPENBLAS_THREAD_TIMEOUT")


def facts(device: str) -> dict[str, str]:
    """What results may depend on besides the work and its items, in this process.

    Args:
        device: As :func:`evalkit.system.devices.resolve_device` takes it.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        kind = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU"
    return {
        "evalkit": __version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "device": kind,
        "threads": str(torch.get_num_threads()),
    }


@dataclass(frozen=True)
class Driver:
    """What a worker must have in common with the process that gives it work.

    Attributes:
        device: The work's: ``cpu``, ``cuda`` or ``mps``.
        threads: Of torch.
        facts: See :func:`facts`.
        environment: Variables for the libraries that start threads.
    """

    device: str
    threads: int
    facts: Mapping[str, str]
    environment: Mapping[str, str]

    @classmethod
    def here(cls, device: str) -> Driver:
        """This process."""
        import torch

        threads = torch.get_num_threads()
        environment = {name: os.environ[name] for name in _OF_THREADS if name in os.environ}
        return cls(
            torch.device(device).type,
            threads,
            facts(device),
            environment | {"OMP_NUM_THREADS": str(threads)},
        )

    def adopt(self) -> None:
        """Give this thread, and the libraries that are not loaded yet, the driver's settings.

        Raises:
            WorkerError: Something else differs.
        """
        os.environ.update(self.environment)
        import torch

        torch.set_num_threads(self.threads)
        here = facts(self.device)
        differing = [name for name, value in self.facts.items() if here.get(name) != value]
        if differing:
            both = ", ".join(f"{name} is {here.get(name)}, not {self.facts[name]}" for name in differing)
            raise WorkerError(
                f"{both} as in the process that gives the work. Results would not be the same: make them "
                "agree, or leave this host out."
            )


class Place(NamedTuple):
    """Where a worker is; ``gpu`` is the number of its GPU, empty without one."""

    host: str
    pid: int
    gpu: str


@dataclass(frozen=True)
class Failure:
    """An error on its way to another process."""

    pickled: bytes | None
    text: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Pickles the error, if it can be unpickled again."""
        trace = "".join(traceback.format_exception(error))
        text = "".join(traceback.format_exception_only(error)).strip()
        pickled = None
        # What is no Exception would end the other process in silence, as if the user had wished it.
        if isinstance(error, Exception):
            try:
                pickled = pickle.dumps(error)
                pickle.loads(pickled)
            except Exception:  # its own code may raise anything
                pickled = None
        return cls(pickled, text, trace)

    def error(self, host: str) -> Exception:
        """The error as it was, with the worker's traceback; one of evalkit's own names the host instead."""
        found: Exception | None = None
        if self.pickled is not None:
            try:
                found = pickle.loads(self.pickled)
            except Exception:  # as above: here it may lack a module
                found = None
        if isinstance(found, EvalkitError):
            found.args = (f"worker {host}: {found}", *found.args[1:])
            return found
        found = found or WorkerError(f"worker {host}: {self.text}")
        found.add_note(f"On worker {host}:\n{self.trace}")
        return found


class Outcome(NamedTuple):
    """How a call ended: with a pickled value or a failure; its last pulse, and how many seconds it took."""

    value: bytes = b""
    failure: Failure | None = None
    done: float = 0.0
    seconds: float = 0.0


@dataclass
class _Task:
    call: Callable[[], Pending[Any]]
    future: Future[Any] = field(default_factory=Future)
    begun: float = 0.0
    seconds: float = 0.0
    pending: Pending[Any] | None = None

    def is_done(self) -> bool:
        return self.pending is not None and self.pending.done()


class Worker:
    """Does one work's items in a thread of its own, which keeps the settings of threads and of devices.

    ``load`` and ``item`` wait for that thread; ``hello`` and ``look`` do not. Ray calls them in several
    threads, of which a later one may run first. So they have numbers, from 0, and are done in this order.
    """

    def __init__(self) -> None:
        self._begin: Callable[[Any, Pulse], Pending[Any]] | None = None
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._turn = threading.Condition()
        self._next = 0
        self._changes = 0
        self._parts: dict[int, float] = {}
        threading.Thread(target=self._work, name="work", daemon=True).start()

    def hello(self) -> Place:
        """Where this is."""
        return Place(socket.gethostname(), os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    def look(self) -> tuple[int, dict[int, float]]:
        """A number that changes with every sign of life of the work, and how much of each item is done."""
        return self._changes, dict(self._parts)

    def load(self, number: int, driver: Driver, pickled: bytes) -> Outcome:
        """Prepare a work, in place of the one before."""

        def prepare() -> Pending[None]:
            self._drop()
            driver.adopt()
            self._begin = pickle.loads(pickled).prepare()
            return Done(None)

        return self._outcome(number, _Task(prepare))

    def item(self, number: int, index: int, pickled: bytes) -> Outcome:
        """Do an item of the work; its value is pickled."""

        def pulse(done: float) -> None:
            self._parts[index] = done
            self._changes += 1

        def begin() -> Pending[Any]:
            assert self._begin is not None
            return self._begin(pickle.loads(pickled), pulse)

        outcome = self._outcome(number, _Task(begin))
        return outcome._replace(done=self._parts.pop(index, 0.0))

    def _outcome(self, number: int, task: _Task) -> Outcome:
        with self._turn:
            self._turn.wait_for(lambda: number == self._next)
            self._tasks.put(task)
            self._next += 1
            self._turn.notify_all()
        try:
            # In the thread that waits, so that the work goes on.
            value = pickle.dumps(task.future.result(), pickle.HIGHEST_PROTOCOL)
        except BaseException as error:  # of the work: all that it raises is the driver's
            return Outcome(failure=Failure.of(error))
        return Outcome(value, seconds=task.seconds)

    def _drop(self) -> None:
        """Free the memory of the work that was."""
        self._begin = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _work(self) -> None:
        """Like :class:`evalkit.system.engine.Inline`: begins what is queued before it waits for a result."""
        ahead: deque[_Task] = deque()
        while True:
            try:
                task = self._tasks.get(block=not ahead)
            except queue.Empty:
                self._end(ahead.popleft())
                continue
            self._changes += 1
            task.begun = time.monotonic()
            try:
                task.pending = task.call()
            except BaseException as error:  # of the work, as above
                task.future.set_exception(error)
                continue
            ahead.append(task)
            while ahead and (len(ahead) > 1 or ahead[0].is_done()):
                self._end(ahead.popleft())

    def _end(self, task: _Task) -> None:
        pending, task.pending = task.pending, None  # it holds memory
        assert pending is not None
        try:
            result = pending.result()
        except BaseException as error:  # of the work, as above
            task.future.set_exception(error)
        else:
            task.seconds = time.monotonic() - task.begun
            task.future.set_result(result)
        self._changes += 1
