"""Communication between the ranks of a torch.distributed group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError, WorkerError

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """The processes of a group, or only this process if torch.distributed is not in use.

    Every rank must call each method, in the same order.

    Args:
        group: A group of torch.distributed; None for all processes.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.

    Raises:
        InputError: This process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self._group = group
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if joined else (0, 1)
        if self.rank < 0:
            raise InputError("This process is not in the group that the evaluator was given.")

    def exchange(self, mine: Any) -> list[Any]:
        """Exchange small picklable objects; returns those of all ranks, in order of rank."""
        found = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(found, mine, group=self._group)
        return found

    def sum(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of the arrays of all ranks, bit-identical on every rank.

        Raises:
            WorkerError: Another rank is out of memory.
        """
        if self.size == 1:
            return mine
        total = self._ready(
            lambda: torch.from_numpy(np.array(mine, np.float64, order="C")).to(self._device())
        )
        dist.all_reduce(total, group=self._group)
        found: NDArray[np.float64] = total.cpu().numpy()
        return found

    def gather(self, mine: NDArray[Any], counts: Sequence[int]) -> NDArray[Any] | None:
        """The rows of all ranks, in order of rank, on rank 0; None on the others.

        Args:
            mine: (n, ...); only n may differ between ranks.
            counts: n of each rank.

        Raises:
            WorkerError: Another rank is out of memory.
        """
        if not any(counts[1:]):
            return None if self.rank else mine

        def prepare() -> tuple[NDArray[Any], Tensor]:
            if self.rank:
                return mine, torch.from_numpy(np.ascontiguousarray(mine)).to(self._device())
            dtype = torch.from_numpy(np.empty(0, mine.dtype)).dtype
            received = torch.empty((max(counts[1:]), *mine.shape[1:]), dtype=dtype, device=self._device())
            return np.empty((sum(counts), *mine.shape[1:]), mine.dtype), received

        found, rows = self._ready(prepare)
        if self.rank:
            if len(mine):
                dist.send(rows, self._global(0), group=self._group)
            return None
        found[: len(mine)] = mine
        begin = len(mine)
        for rank, count in enumerate(counts):
            if rank and count:
                dist.recv(rows[:count], self._global(rank), group=self._group)
                torch.from_numpy(found[begin : begin + count]).copy_(rows[:count])
                begin += count
        return found

    def _ready(self, prepare: Callable[[], T]) -> T:
        """The result of ``prepare``. If it fails on one rank, all ranks raise, so that none waits forever."""
        made: list[T] = []
        failure: Exception | None = None
        try:
            made.append(prepare())
        except Exception as error:
            failure = error
        problems = self.exchange(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise WorkerError(f"Rank {rank} failed: {problem}")
        return made[0]

    def _device(self) -> torch.device:
        """Device for the group's backend: the CPU if it supports it, otherwise this rank's GPU."""
        on_host = "cpu:" in dist.get_backend_config(self._group)
        return torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())

    def _global(self, rank: int) -> int:
        group: Any = self._group or dist.group.WORLD
        return dist.get_global_rank(group, rank)
