"""Batches on their way to a CUDA device and back, so that the device need not wait for the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.extractors.base import Rows
from evalkit.system.engine import Done, Pending

__all__ = ["Copies", "Upload", "fetched", "upload"]

T = TypeVar("T")

_AHEAD = 4
"""Batches that may be on the device at once: with more, pixels only take up its memory."""

_PINNED_BYTES = 2**27


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; on CUDA, asynchronously. The caller may overwrite it when this returns."""
    if device.type != "cuda" or host.is_pinned():
        # The caller may overwrite its own pinned memory at once, so this waits for the copy.
        return host.to(device)
    # torch never frees pinned memory, so large batches are not pinned.
    if host.nbytes <= _PINNED_BYTES:
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def fetched(outputs: Mapping[str, Tensor]) -> Pending[Mapping[str, Rows]]:
    """Copy the rows of each output to the host; on CUDA, asynchronously."""
    if any(rows.device.type == "cuda" for rows in outputs.values()):
        return Copies(outputs)
    return Done({output: rows.cpu().numpy() for output, rows in outputs.items()})


class Upload:
    """Copies batches to a CUDA device while it computes on those before.

    Pinned memory comes from torch, which reuses it once the copies out of it are done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._in_progress: deque[torch.cuda.Event] = deque()

    def __call__(self, images: NDArray[np.generic], compute: Callable[[Tensor], T]) -> T:
        """``compute`` of the images on the device; waits only where several batches are on it already."""
        while len(self._in_progress) >= _AHEAD:
            self._in_progress.popleft().synchronize()
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            with torch.cuda.stream(self._stream):
                x = upload(torch.from_numpy(images), self._device)
            here.wait_stream(self._stream)
            x.record_stream(here)  # its memory may be reused only after that, too
            result = compute(x)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(here)
        self._in_progress.append(done)
        return result


class Copies:
    """Features on their way back from a CUDA device.

    Args:
        outputs: The rows of each output, in parts.
    """

    def __init__(self, outputs: Mapping[str, Tensor]) -> None:
        self._copies = {}
        device = next(iter(outputs.values())).device
        with torch.cuda.device(device):
            for output, rows in outputs.items():
                # Independent of torch.set_default_device.
                self._copies[output] = torch.empty(
                    rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True
                )
                self._copies[output].copy_(rows, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def done(self) -> bool:
        """Whether they have arrived."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def result(self) -> dict[str, Rows]:
        """The rows of each output, once they have arrived."""
        self._event.synchronize()
        # Out of the pinned memory, which the next batch needs.
        return {output: copy.numpy().copy() for output, copy in self._copies.items()}
