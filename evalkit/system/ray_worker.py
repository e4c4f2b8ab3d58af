"""Code that runs in the workers of :mod:`evalkit.system.ray_engine`. It does not import Ray."""

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

# Libraries read these when they are loaded, so they are set before importing torch and NumPy.
_OF_THREADS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OPENBLAS_THREAD_TIMEOUT")


def facts(device: str) -> dict[str, str]:
    """Properties of this process that results may depend on, besides the work and its items.

    Args:
        device: As for :func:`evalkit.system.devices.resolve_device`.
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
    """Properties that a worker must share with the process that gives it work (the driver).

    Attributes:
        device: Type of the work's device: ``cpu``, ``cuda`` or ``mps``.
        threads: Number of torch threads.
        facts: See :func:`facts`.
        environment: Environment variables for libraries that start threads.
    """

    device: str
    threads: int
    facts: Mapping[str, str]
    environment: Mapping[str, str]

    @classmethod
    def here(cls, device: str) -> Driver:
        """The properties of this process."""
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
        """Apply the driver's settings to this thread, and to libraries that are not loaded yet.

        Raises:
            WorkerError: Another property differs.
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
    """Location of a worker; ``gpu`` is the number of its GPU, empty without one."""

    host: str
    pid: int
    gpu: str


@dataclass(frozen=True)
class Failure:
    """An error to be sent to another process."""

    pickled: bytes | None
    text: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Pickle the error, if it can also be unpickled."""
        trace = "".join(traceback.format_exception(error))
        text = "".join(traceback.format_exception_only(error)).strip()
        pickled = None
        # Other BaseExceptions, such as SystemExit, would end the driver silently.
        if isinstance(error, Exception):
            try:
                pickled = pickle.dumps(error)
                pickle.loads(pickled)
            except Exception:  # the error's own code may raise anything
                pickled = None
        return cls(pickled, text, trace)

    def error(self, host: str) -> Exception:
        """The original error, with the worker's traceback; evalkit's own errors name the host instead."""
        found: Exception | None = None
        if self.pickled is not None:
            try:
                found = pickle.loads(self.pickled)
            except Exception:  # as above; a module may also be missing here
                found = None
        if isinstance(found, EvalkitError):
            found.args = (f"worker {host}: {found}", *found.args[1:])
            return found
        found = found or WorkerError(f"worker {host}: {self.text}")
        found.add_note(f"On worker {host}:\n{self.trace}")
        return found


class Outcome(NamedTuple):
    """Result of a call: a pickled value or a failure, its last pulse, and its duration in seconds."""

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
    """Processes the items of one work in a dedicated thread, which keeps its thread and device settings.

    ``load`` and ``item`` wait for that thread; ``hello`` and ``look`` do not. Ray calls ``load`` and ``item``
    in several threads, possibly out of order. So calls are numbered from 0, and run in this order.
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
        """The location of this worker."""
        return Place(socket.gethostname(), os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    def look(self) -> tuple[int, dict[int, float]]:
        """A counter that changes whenever the work progresses, and the amount done of each item."""
        return self._changes, dict(self._parts)

    def load(self, number: int, driver: Driver, pickled: bytes) -> Outcome:
        """Prepare a work, replacing the previous one."""

        def prepare() -> Pending[None]:
            self._drop()
            driver.adopt()
            self._begin = pickle.loads(pickled).prepare()
            return Done(None)

        return self._outcome(number, _Task(prepare))

    def item(self, number: int, index: int, pickled: bytes) -> Outcome:
        """Process an item of the work; its value is pickled."""

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
            # Pickled in the waiting thread, so that the work continues.
            value = pickle.dumps(task.future.result(), pickle.HIGHEST_PROTOCOL)
        except BaseException as error:  # every error of the work is passed to the driver
            return Outcome(failure=Failure.of(error))
        return Outcome(value, seconds=task.seconds)

    def _drop(self) -> None:
        """Free the memory of the previous work."""
        self._begin = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _work(self) -> None:
        """As :class:`evalkit.system.engine.Inline`: starts queued items before waiting for a result."""
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
            except BaseException as error:  # as above
                task.future.set_exception(error)
                continue
            ahead.append(task)
            while ahead and (len(ahead) > 1 or ahead[0].is_done()):
                self._end(ahead.popleft())

    def _end(self, task: _Task) -> None:
        pending, task.pending = task.pending, None  # free its memory
        assert pending is not None
        try:
            result = pending.result()
        except BaseException as error:  # as above
            task.future.set_exception(error)
        else:
            task.seconds = time.monotonic() - task.begun
            task.future.set_result(result)
        self._changes += 1
