"""The Ray engine: workers on one or many machines, as one actor per GPU, or per group of CPU threads."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeAlias, TypeVar

from evalkit import __version__
from evalkit.errors import InputError, MissingDependencyError, WorkerError, brief, first_line
from evalkit.system.engine import Engine, Work, WorkerState
from evalkit.system.processes import cores
from evalkit.system.ray_connection import joined_ray, private_ray
from evalkit.system.ray_member import LOADING, Call, Member
from evalkit.system.ray_worker import Driver, Outcome, Place, Worker

__all__ = ["STALL_SECONDS", "ray_engine"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Watch: TypeAlias = Callable[[Sequence[WorkerState]], object]

logger = logging.getLogger(__name__)

STALL_SECONDS = 600.0
"""Maximum time without progress of an item or of loading; ``EVALKIT_STALL_SECONDS`` overrides it."""

TRIES = 4
LOOK_SECONDS = 1.0
UNSTARTED_SECONDS = 30.0
RESUME = "Stored results are kept: run the same command again to resume."


@contextmanager
def ray_engine(address: str | None = None, *, watch: Watch | None = None) -> Iterator[Engine]:
    """An engine whose workers are Ray actors, within the block.

    Args:
        address: ``HOST:PORT`` of a cluster that has a node on this machine. None starts a private Ray
            instance on this machine.
        watch: Called about once a second, and on every change, with the states of all workers.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: The cluster cannot be joined, or Ray does not start.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("Several workers need Ray: pip install 'evalkit[cluster]'")
    stall = _stall_seconds()
    with private_ray() if address is None else joined_ray(address):
        yield _RayEngine(stall, watch, is_private=address is None)


def _stall_seconds() -> float:
    text = os.environ.get("EVALKIT_STALL_SECONDS", str(STALL_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"EVALKIT_STALL_SECONDS={text!r} in the environment: expected seconds above 0.")
    return seconds


class _RayEngine:
    """See :func:`ray_engine`. Not thread-safe; runs one ``map`` at a time."""

    def __init__(self, stall: float, watch: Watch | None, *, is_private: bool) -> None:
        import ray

        self._ray: Any = ray
        self.stall = stall
        self._watch = watch
        self._is_private = is_private
        self._class = self._ray.remote(max_restarts=0, concurrency_groups={"work": 2, "look": 1})(Worker)
        self.members: list[Member] = []
        self._deaths: list[int] = []
        self._in_map = False

    def map(
        self,
        work: Work[Item, Result],
        items: Iterable[Item],
        report: Callable[[float], object] | None = None,
    ) -> Generator[tuple[int, Result], None, None]:
        """Results of all workers, in order of completion; see :class:`evalkit.system.engine.Engine`."""
        if self._in_map:
            raise RuntimeError("An engine of Ray does one map at a time.")
        self._in_map = True
        self._deaths.clear()
        try:
            yield from _Job(self, self._ray, work, items, report).results()
        finally:
            self._in_map = False
            for member in [member for member in self.members if member.items()]:
                self.drop(member)

    def capacity(self, driver: Driver) -> int:
        """Maximum number of workers on the machines that are currently available."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if driver.device == "cuda":
            found = sum(int(node.get("GPU", 0)) for node in nodes)
        elif self._is_private:
            found = cores() // driver.threads
        else:
            found = sum(int(node.get("CPU", 0)) // driver.threads for node in nodes)
        # An autoscaling cluster grows only if a worker is waiting.
        return max(1, found)

    def start(self, driver: Driver) -> None:
        """Request another worker; it starts when resources are free."""
        is_gpu = driver.device == "cuda"
        cpus = 0 if is_gpu or self._is_private else driver.threads
        actor = self._class.options(num_gpus=1 if is_gpu else 0, num_cpus=cpus).remote()
        deaths = self._deaths.pop() if self._deaths else 0
        self.members.append(Member(actor, actor.hello.remote(), driver.device, deaths))

    def drop(self, member: Member) -> None:
        """Kill a worker, whatever it is doing."""
        self.members.remove(member)
        if self._ray.is_initialized():
            self._ray.kill(member.actor, no_restart=True)

    def replace_loading(self, member: Member) -> None:
        """Record, for the replacement, that this worker died while loading."""
        self._deaths.append(member.deaths + 1)

    def tell(self, lost: Member | None = None) -> None:
        """Call ``watch``."""
        if self._watch is not None:
            states = [member.state() for member in self.members]
            self._watch(states if lost is None else [*states, lost.state("lost")])


class _Job(Generic[Item, Result]):
    """A single call of ``map``."""

    def __init__(
        self,
        engine: _RayEngine,
        ray: Any,
        work: Work[Item, Result],
        items: Iterable[Item],
        report: Callable[[float], object] | None,
    ) -> None:
        self._engine = engine
        self._ray = ray
        self._name = work.name
        self._driver = Driver.here(work.device)
        self._pickled: bytes = ray.cloudpickle.dumps(work)
        self._stored = ray.put(self._pickled)
        self._items = enumerate(items)
        self._are_more = True
        self._todo: deque[Call] = deque()
        self._report = report
        self._reported = self._finished = 0.0
        self._capacity = 1
        self._looked = self._with_workers = time.monotonic()
        self._has_said = False

    def results(self) -> Iterator[tuple[int, Result]]:
        """Yield the results of all items, in order of completion."""
        engine = self._engine
        for member in [each for each in engine.members if each.device != self._driver.device]:
            engine.drop(member)
        self._capacity = engine.capacity(self._driver)
        found = None
        while True:
            self._hand_out()
            self._tell()
            if found is not None:
                yield found
            if not (self._todo or self._are_more or any(member.items() for member in engine.members)):
                return
            found = self._answer()
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                self._look()

    # ------------------------------------------------------------------------------------ giving out items

    def _hand_out(self) -> None:
        """Assign items to workers with free slots, and start workers while there are items for them."""
        members = self._engine.members
        # Idle workers first.
        for member in sorted(members, key=lambda member: len(member.calls)):
            while member.place is not None and not member.is_loading() and member.room() > 0:
                if member.work != self._pickled:
                    # Starting workers may wait for a device forever, so no items are reserved for them.
                    if self._have(1 + sum(each.is_loading() for each in members if each.place)):
                        self._call(member, Call(LOADING, self._pickled))
                    break
                if not self._have(1):
                    break
                self._call(member, self._todo.popleft())
        while len(members) < self._capacity and self._have(1 + sum(each.is_loading() for each in members)):
            self._engine.start(self._driver)

    def _have(self, count: int) -> bool:
        """Whether at least ``count`` items are waiting."""
        while len(self._todo) < count:
            if not self._take():
                return False
        return True

    def _take(self) -> bool:
        """Take the next item; False if there is none."""
        for index, item in self._items if self._are_more else ():
            self._todo.append(Call(index, pickle.dumps(item, pickle.HIGHEST_PROTOCOL)))
            return True
        self._are_more = False
        return False

    def _call(self, member: Member, item: Call) -> None:
        if not member.calls:
            member.quiet = 0.0
        arguments: tuple[Any, ...] = member.given, item.index, item.pickled
        method = member.actor.item
        if item.index == LOADING:
            method, arguments = member.actor.load, (member.given, self._driver, self._stored)
            member.forget()
        member.given += 1
        member.calls[method.options(concurrency_group="work").remote(*arguments)] = item

    # --------------------------------------------------------------------------------------------- answers

    def _answer(self) -> tuple[int, Result] | None:
        """Wait for an answer, at most until the next check; return it if it is a result."""
        owners = {
            reference: member
            for member in self._engine.members
            for reference in (member.calls if member.place else [member.hello])
        }
        left = self._looked + LOOK_SECONDS - time.monotonic()
        ready, _ = self._ray.wait(list(owners), num_returns=1, timeout=max(0.0, left))
        for reference in ready:
            member = owners[reference]
            answer = self._get(member, reference)
            if isinstance(answer, Place):
                member.place = answer
            elif isinstance(answer, Outcome):
                return self._ended(member, member.calls.pop(reference), answer)
        return None

    def _get(self, member: Member, reference: Any) -> Any:
        """The worker's answer; None if the worker was lost."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise WorkerError(f"{member.who()} cannot do its work: {first_line(error)}") from error
        except errors.RayError as error:
            text = str(error)
            if "in its creation task" in text:
                found = re.search(r"ip=([^,\s]+)", text)
                where = f" at {found[1]}" if found else ""
                raise WorkerError(
                    f"A worker{where} does not start: {brief(text.splitlines()[-1], 200)}. All hosts need "
                    f"evalkit {__version__}."
                ) from error
            reason = " ".join(text.split()).rpartition("The actor is dead because ")[2]
            self._lose(member, f"died, as if killed or out of memory (Ray says: {brief(reason, 150)})")
            return None

    def _ended(self, member: Member, item: Call, outcome: Outcome) -> tuple[int, Result] | None:
        member.quiet = 0.0
        if item.index == LOADING and item.pickled != self._pickled:
            return None  # from an earlier map
        if outcome.failure is not None:
            raise outcome.failure.error(member.place.host if member.place else "")
        if item.index == LOADING:
            member.work, member.deaths = item.pickled, 0
            return None
        member.seconds = outcome.seconds
        member.parts.pop(item.index, None)
        member.finished += outcome.done
        self._finished += outcome.done
        return item.index, pickle.loads(outcome.value)

    # ------------------------------------------------------------------------------------------ watching

    def _look(self) -> None:
        """Poll all workers for progress, without waiting, and drop those that have stalled."""
        now = time.monotonic()
        # If this process was suspended, do not count that time against the workers.
        passed = min(now - self._looked, 2 * LOOK_SECONDS)
        self._looked = now
        engine = self._engine
        self._capacity = engine.capacity(self._driver)
        asked = {member.look: member for member in engine.members if member.look is not None}
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
        for reference in answered:
            member = asked[reference]
            found = self._get(member, reference)
            if found is None:
                continue
            member.look = None
            changes, parts = found
            in_hand = {item.index for item in member.items()}
            member.parts = {index: done for index, done in parts.items() if index in in_hand}
            if changes != member.changes:
                member.changes, member.quiet = changes, 0.0
            member.totals.append((now, member.finished + sum(member.parts.values())))
        for member in list(engine.members):
            if member.place is not None and member.look is None:
                member.look = member.actor.look.options(concurrency_group="look").remote()
            if member.calls:
                member.quiet += passed
                if member.quiet > engine.stall:
                    self._lose(member, f"made no progress for {engine.stall:g} s (EVALKIT_STALL_SECONDS)")
        if any(member.place is not None for member in engine.members):
            self._with_workers, self._has_said = now, False
        elif not self._has_said and now - self._with_workers > UNSTARTED_SECONDS:
            self._has_said = True
            needs = "a free GPU" if self._driver.device == "cuda" else f"{self._driver.threads} free cores"
            logger.info("No worker could be started yet: each needs %s. Waiting.", needs)

    def _tell(self) -> None:
        done = self._finished + sum(sum(member.parts.values()) for member in self._engine.members)
        if self._report is not None and done != self._reported:
            self._reported = done
            self._report(done)
        self._engine.tell()

    def _lose(self, member: Member, reason: str) -> None:
        """Drop a lost worker, and queue its unfinished items again.

        Raises:
            WorkerError: An item, or loading, has failed too many times.
        """
        was_loading, items = member.is_loading(), member.items()
        self._engine.drop(member)
        self._engine.tell(member)
        if was_loading:
            if member.deaths + 1 >= TRIES:
                raise WorkerError(
                    f"{self._name}: {member.who()} was lost while loading, as {TRIES - 1} before it in its "
                    f"place: it {reason}. {RESUME}"
                )
            self._engine.replace_loading(member)
        if items:
            # The worker had not started the others.
            first = items[0]
            first.tries += 1
            if first.tries >= TRIES:
                done = member.parts.get(first.index, 0.0)
                raise WorkerError(
                    f"{self._name}: item {first.index} was tried {TRIES} times. The last time, "
                    f"{member.who()} {reason}; {done:g} of it was done. {RESUME}"
                )
        self._todo.extendleft(reversed(items))
