"""CUDA graphs: the kernels of a function, recorded once and launched again without work on the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = ["CudaRecorder", "Graphs", "Recorder"]

WARM_UPS = 2

Replay: TypeAlias = Callable[[], object]
Given: TypeAlias = "dict[int | str, Tensor | float | None]"
"""Inputs of a function by position or name."""


class Recorder(Protocol):
    """Records functions and launches them again."""

    def record(self, run: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
        """Record ``run``, which may be called several times.

        Returns:
            A function that computes again, from what the tensors that ``run`` reads hold then; and the tensor
            that it writes its result to. Another recording's replay may overwrite that tensor.
        """

    def release(self) -> None:
        """Drop all recordings and give their memory back to the device."""


class CudaRecorder:
    """Records CUDA graphs, whose temporary tensors share memory."""

    def __init__(self) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def record(self, run: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
        """See :class:`Recorder`.

        Raises:
            torch.OutOfMemoryError: The device's memory does not suffice; nothing is recorded.
        """
        # Kept for good: cuBLAS keeps a workspace for every stream that it has seen.
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream, caller = self._stream, torch.cuda.current_stream(device)
        stream.wait_stream(caller)
        graph = torch.cuda.CUDAGraph()
        failure: RuntimeError | None = None
        with torch.cuda.stream(stream):
            # Compiles kernels and chooses algorithms, which cannot be done while recording.
            for _ in range(WARM_UPS):
                run()
            try:
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                ):
                    try:
                        output = run()
                    except RuntimeError as error:
                        failure = error
            except RuntimeError as error:  # a recording that was cut short may not end well either
                failure = failure or error
        caller.wait_stream(stream)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # whose traceback holds this frame, and that the tensors
        self._graphs.append(graph)
        return graph.replay, output

    def release(self) -> None:
        """See :class:`Recorder`."""
        if self._stream is None:
            return
        torch.cuda.synchronize(self._stream.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None  # a pool cannot be used again once it has lost its last graph
        torch.cuda.empty_cache()


@dataclass(frozen=True, eq=False)
class _Recording:
    """A recorded call.

    Attributes:
        inputs: The tensors that it reads, by position or name.
        replay: Computes ``output`` from them.
        output: What it writes.
    """

    inputs: dict[int | str, Tensor]
    replay: Replay
    output: Tensor


class Graphs:
    """Calls functions of tensors through graphs, one for each function and each shape of its inputs.

    The settings of arithmetic and the addresses of the weights are those of the first call.

    Args:
        recorder: Records them.

    Attributes:
        batch_size: Smaller batches are padded to this size by their last row, so that a batch needs no graph
            of its own, and its bytes do not depend on which graphs there are. None: no padding.
    """

    def __init__(self, recorder: Recorder | None = None):
        self.batch_size: int | None = None
        self._recorder = recorder or CudaRecorder()
        self._recordings: dict[Hashable, _Recording] = {}

    def resize(self, batch_size: int | None) -> None:
        """Set ``batch_size``; at another one than before, drop all graphs and free their memory."""
        if batch_size != self.batch_size:
            self._recordings.clear()
            self._recorder.release()
            self.batch_size = batch_size

    @torch.no_grad()
    def __call__(
        self,
        function: Callable[..., Tensor],
        network: Callable[..., Tensor],
        *inputs: Tensor | float | None,
        **named: Tensor | float | None,
    ) -> Tensor:
        """``function(network, *inputs, **named)``, without gradients.

        Args:
            function: Waits for no result of the device. It gets a number as a tensor without dimensions.
            network: Passed on.
            inputs: The first is a tensor; the first dimension of all tensors is the batch.
            named: As ``inputs``.

        Returns:
            A tensor of the caller's own, with a row for each of the batch.

        Raises:
            torch.OutOfMemoryError: The device's memory does not suffice.
        """
        given: Given = dict(enumerate(inputs))
        given.update(named)
        x = given[0]
        assert isinstance(x, Tensor)
        rows = len(x)
        size = max(rows, self.batch_size or 0)
        key = function, network, size, tuple((name, _kind(value)) for name, value in given.items())
        recording = self._recordings.get(key)
        if recording is None:
            buffers = {
                name: _buffer(value, size, x.device) for name, value in given.items() if value is not None
            }
            _fill(buffers, given)
            first = [buffers.get(position) for position in range(len(inputs))]
            rest = {name: buffers.get(name) for name in named}
            replay, output = self._recorder.record(lambda: function(network, *first, **rest), x.device)
            recording = self._recordings[key] = _Recording(buffers, replay, output)
        else:
            _fill(recording.inputs, given)
        recording.replay()
        return recording.output[:rows].clone()


def _kind(value: Tensor | float | None) -> Hashable:
    """What decides whether a graph fits an input, apart from the size of the batch."""
    if isinstance(value, Tensor):
        return tuple(value.shape[1:]), value.dtype
    return value is None


def _buffer(value: Tensor | float, size: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return torch.empty(size, *value.shape[1:], dtype=value.dtype, device=device)
    return torch.empty((), dtype=torch.float32, device=device)


def _fill(buffers: dict[int | str, Tensor], given: Given) -> None:
    for name, buffer in buffers.items():
        value = given[name]
        if isinstance(value, Tensor):
            buffer[: len(value)].copy_(value)
            if len(value) < len(buffer):
                buffer[len(value) :].copy_(value[-1:])
        elif value is not None:
            buffer.fill_(value)
