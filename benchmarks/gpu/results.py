"""Helpers for the stages of acceptance.py: lines of JSON, sizes, times, differences and features."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# With EVALKIT_ACCEPTANCE_DEVICE=cpu, a stage's own checks can be tested on any machine.
CUDA = torch.device(os.environ.get("EVALKIT_ACCEPTANCE_DEVICE", "cuda"))

_DIVISOR = int(os.environ.get("EVALKIT_ACCEPTANCE_DIVISOR", "1"))


def reduced(count: int, least: int = 1) -> int:
    """A number of images, rows or bytes, divided by EVALKIT_ACCEPTANCE_DIVISOR."""
    return max(least, count // _DIVISOR)


def is_reduced() -> bool:
    """Whether this is only a test run, on a machine without a GPU."""
    return _DIVISOR > 1


def report(what: str, value: Any, **more: Any) -> None:
    """One result, as a line of JSON."""
    if isinstance(value, float):
        value = float(f"{value:.5g}")
    print(json.dumps({"what": what, "value": value} | more), flush=True)


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Report an error as a result, and go on."""
    try:
        yield
    except Exception as error:
        report(what, f"{type(error).__name__}: {str(error)[:600]}")


def synchronize() -> None:
    """Wait until the device has finished all work."""
    if CUDA.type == "cuda":
        torch.cuda.synchronize(CUDA)


def seconds_of(run: Callable[[], object], repeat: int = 10, warm_up: int = 2) -> float:
    """Seconds of one call on the device, the median of ``repeat`` after some to warm up."""
    for _ in range(warm_up):
        run()
    if CUDA.type != "cuda":
        return sorted(_wall_seconds(run) for _ in range(repeat))[repeat // 2]
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)
    ]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeat // 2] / 1e3


def _wall_seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to what is expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def largest_relative(found: Any, expected: Any) -> float:
    """The largest difference of two numbers or arrays, relative to the largest number expected."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if not a.size or np.array_equal(a, b):
        return 0.0
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float64).tiny))


def features(n: int, seed: int, dimensions: int = 2048) -> NDArray[np.float32]:
    """(n, dimensions) non-negative rows like a network's: many correlated directions, and some noise.

    Rows of different seeds are drawn from the same distribution.
    """
    device = torch.device("cpu") if is_reduced() else CUDA  # on a fake GPU they would all be zero
    make = torch.Generator(device)
    width = 256
    basis = torch.randn(width, dimensions, device=device, generator=make.manual_seed(1))
    scales = torch.linspace(3, 0.05, width, device=device)
    make.manual_seed(seed)
    z = torch.randn(n, width, device=device, generator=make) * scales
    noise = torch.randn(n, dimensions, device=device, generator=make)
    return (z @ basis / 16).add_(noise, alpha=0.1).relu_().cpu().numpy()
