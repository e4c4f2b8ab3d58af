"""The processes that share the batch of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from evalkit.errors import InputError
from evalkit.system.processes import world_size

__all__ = ["ProcessGroup", "join_group"]


class ProcessGroup:
    """The processes that torchrun started, or this one alone.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
    """

    def __init__(self, rank: int, size: int):
        self.rank = rank
        self.size = size

    def gather(self, values: Tensor, dim: int = 0) -> Tensor:
        """The values of all processes, joined in the order of their ranks."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts, dim)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def share(self, batch_size: int) -> slice:
        """The positions in a batch that this process learns from.

        Raises:
            InputError: The batch cannot be divided equally.
        """
        if batch_size % self.size:
            raise InputError(
                f"A batch of {batch_size} images cannot be divided among {self.size} processes; give a "
                "multiple."
            )
        size = batch_size // self.size
        return slice(self.rank * size, (self.rank + 1) * size)


@contextmanager
def join_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, for as long as the block runs; without torchrun, alone."""
    size = world_size()
    if size == 1:
        yield ProcessGroup(0, 1)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ProcessGroup(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
