"""Rank and world size of `evalkit train`, and the number of cores of this process.

No other module reads torchrun's variables.
"""

from __future__ import annotations

import os

from evalkit.errors import InputError

__all__ = ["cores", "is_main_process", "local_rank", "local_world_size", "rank", "world_size"]


def cores() -> int:
    """Number of cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # only on Linux
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def rank() -> int:
    """Rank of this process, 0 to :func:`world_size` - 1; 0 without torchrun.

    Raises:
        InputError: ``RANK`` and ``WORLD_SIZE`` are not 0 to size - 1 and size.
    """
    return _rank_and_size()[0]


def world_size() -> int:
    """Number of processes; 1 without torchrun.

    Raises:
        InputError: As :func:`rank`.
    """
    return _rank_and_size()[1]


def is_main_process() -> bool:
    """Whether this is rank 0, the process that prints."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int | None:
    """Rank among the processes of this machine; None without torchrun."""
    return _count("LOCAL_RANK")


def local_world_size() -> int:
    """Number of processes on this machine; 1 without torchrun."""
    return _count("LOCAL_WORLD_SIZE") or 1


def _rank_and_size() -> tuple[int, int]:
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(f"RANK={rank!r} and WORLD_SIZE={size!r} in the environment: expected 0 to size - 1.")
    return int(rank), int(size)


def _count(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise InputError(f"{name}={value!r} in the environment: expected a whole number.")
    return int(value)
