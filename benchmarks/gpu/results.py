"""What the stages of acceptance.py share: results as lines of JSON, and times on the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda")


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


def seconds_of(run: Callable[[], object], repeat: int = 10) -> float:
    """Seconds of one call on the device, the median of ``repeat`` after two to warm up."""
    for _ in range(2):
        run()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)
    ]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeat // 2] / 1e3


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to what is expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())
