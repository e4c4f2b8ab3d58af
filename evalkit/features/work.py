"""Work on pieces of a batch: compute rows from images, or sums over many images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError
from evalkit.extractors.base import Extractor, Rows, RunsAhead, TakesTensors
from evalkit.features import store
from evalkit.features.moments import Moments, check_rows
from evalkit.features.pieces import Piece
from evalkit.features.writer import RowsOf
from evalkit.images import ImageSource
from evalkit.system.devices import accelerator
from evalkit.system.engine import Done, Inline, Pending, Pulse

__all__ = ["Begun", "Extract", "SumUp", "Sums", "chosen_rows", "pass_size", "sums_device", "tensor_device"]


def pass_size(extractor: Extractor) -> int:
    """Images per forward pass: a power of two, like a shard, so that no pass crosses the end of a piece."""
    return min(store.SHARD, 1 << (extractor.batch_size.bit_length() - 1))


class Begun:
    """A piece in progress: its images were submitted to the networks, but features may still be pending.

    Args:
        count: Number of images in the piece.
        extractors: The networks.
    """

    def __init__(self, count: int, extractors: Sequence[Extractor]) -> None:
        self._rows: RowsOf = {
            extractor.network: {
                output: np.empty((count, d), np.float32) for output, d in extractor.outputs.items()
            }
            for extractor in extractors
        }
        self._parts: deque[tuple[str, slice, Pending[Mapping[str, Rows]]]] = deque()

    def add(self, extractor: Extractor, images: NDArray[Any] | Tensor, at: int) -> None:
        """Submit images to a network; the first one is at position ``at`` in the piece.

        Tensors are only for networks that accept them.
        """
        if isinstance(images, Tensor):
            assert _takes_tensors(extractor)
            pending = extractor.submit_tensor(images)
        else:
            pending = extractor.submit(images) if _runs_ahead(extractor) else Done(extractor(images))
        self._parts.append((extractor.network, slice(at, at + len(images)), pending))
        while self._parts and self._parts[0][2].done():
            self._take()

    def done(self) -> bool:
        """Whether :meth:`result` would return without waiting."""
        return all(pending.done() for _, _, pending in self._parts)

    def result(self) -> RowsOf:
        """All rows; waits until they are complete."""
        while self._parts:
            self._take()
        return self._rows

    def _take(self) -> None:
        network, rows, pending = self._parts.popleft()
        for output, found in pending.result().items():
            self._rows[network][output][rows] = found


def _runs_ahead(extractor: Extractor) -> TypeGuard[RunsAhead]:
    """Whether ``submit`` is equivalent to a call: it is not if a subclass overrides only the call."""
    return _stands_for(extractor, "submit", "__call__")


def _takes_tensors(extractor: Extractor) -> TypeGuard[TakesTensors]:
    """Whether ``submit_tensor`` is equivalent to ``submit`` and to a call."""
    return all(_stands_for(extractor, "submit_tensor", name) for name in ("submit", "__call__"))


def _stands_for(extractor: Extractor, one: str, other: str) -> bool:
    def owner(name: str) -> type | None:
        return next((kind for kind in type(extractor).__mro__ if name in vars(kind)), None)

    found, replaced = owner(one), owner(other)
    return found is not None and replaced is not None and issubclass(found, replaced)


def tensor_device(extractors: Iterable[Extractor]) -> torch.device | None:
    """The device whose tensors all networks accept; None if any network accepts only arrays."""
    found = {each.tensor_device if _takes_tensors(each) else None for each in extractors}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, eq=False)
class Extract:
    """Computes the rows of pieces, for the networks that each piece names.

    Attributes:
        images: The batch.
        extractors: The networks.
        batch_sizes: Images per forward pass, by network: powers of two; no piece ends within a pass.
    """

    images: ImageSource
    extractors: tuple[Extractor, ...]
    batch_sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        """For messages."""
        return f"features of {self.images.name}"

    @property
    def device(self) -> str:
        """Device of the first network that is not on the CPU."""
        return _device_of(self.extractors)

    def prepare(self) -> Callable[[Piece, Pulse], Pending[RowsOf]]:
        """A function that starts a piece. Consecutive pieces share one stream of images."""
        stream = _Stream(self.images, max(self.batch_sizes.values()))
        by_network = {extractor.network: extractor for extractor in self.extractors}

        def begin(piece: Piece, pulse: Pulse) -> Pending[RowsOf]:
            extractors = [by_network[network] for network in piece.networks]
            begun = Begun(piece.end - piece.begin, extractors)
            position = 0
            pulse(position)
            for batch in stream.read(piece.begin, piece.end, lambda: pulse(0)):
                for extractor in extractors:
                    size = self.batch_sizes[extractor.network]
                    for first in range(0, len(batch), size):
                        begun.add(extractor, batch[first : first + size], position + first)
                position += len(batch)
                pulse(position)
            self.images.check_unchanged()  # the store's key was computed earlier
            return begun

        return begin


def _device_of(extractors: Iterable[Extractor]) -> str:
    """Device of the first network that is not on the CPU."""
    devices = [str(getattr(extractor, "device", "cpu")) for extractor in extractors]
    # TensorFlow calls its first GPU "GPU:0".
    return next((each.lower().replace("gpu", "cuda") for each in devices if each != "cpu"), "cpu")


def sums_device(extractors: Iterable[Extractor]) -> torch.device | None:
    """The networks' GPU, to accumulate moments there; None without a GPU."""
    try:
        return accelerator(_device_of(extractors))
    except InputError:
        return None  # a TensorFlow GPU, with a CPU build of torch


class _Stream:
    """Reads the images of pieces ahead.

    Args:
        images: The batch.
        size: Images read at a time.
    """

    def __init__(self, images: ImageSource, size: int) -> None:
        self._images = images
        self._size = size
        self._batches: Generator[NDArray[Any], None, None] | None = None
        self._position = 0
        self._stop: int | None = None

    def read(self, begin: int, end: int, passing: Callable[[], object]) -> Iterator[NDArray[Any]]:
        """Images ``begin`` to ``end`` (exclusive); calls ``passing`` for batches that are only skipped."""
        in_order = self._images.reads_in_order
        goes_on = self._position <= begin if in_order else self._position == begin != self._stop
        if self._batches is None or not goes_on:
            # After a gap, another worker probably does the next piece too, so do not read beyond this one.
            self._stop = None if in_order or self._position == begin else end
            if self._batches is not None:
                self._batches.close()
            self._batches = self._images.batches(self._size, begin, self._stop)
            self._position = begin
        while self._position < end:
            batch = next(self._batches, None)
            if batch is None:
                raise InputError(
                    f"{self._images.name} ended at image {self._position}; "
                    f"expected {len(self._images)} images."
                )
            self._position += len(batch)
            if self._position > begin:
                yield batch
            else:
                passing()


@dataclass(frozen=True, eq=False)
class SumUp:
    """Computes moments of groups of pieces and selected rows, so that workers need not send all rows.

    Attributes:
        extract: Computes the rows.
        sums: Widths of the outputs that are accumulated as sums, by network.
        kept: Outputs whose rows are kept, by network.
        rows: (m,) ascending indices of the images whose rows are kept; None for all.
    """

    extract: Extract
    sums: Mapping[str, Mapping[str, int]]
    kept: Mapping[str, Sequence[str]]
    rows: NDArray[np.int64] | None

    @property
    def name(self) -> str:
        """For messages."""
        return f"mean and covariance of {self.extract.name}"

    @property
    def device(self) -> str:
        """Device of the networks."""
        return self.extract.device

    def prepare(self) -> Callable[[Sequence[Piece], Pulse], Pending[tuple[Sums, RowsOf]]]:
        """A function that processes a group of consecutive pieces; within it, the device runs ahead."""
        begin = self.extract.prepare()

        def sum_up(pieces: Sequence[Piece], pulse: Pulse) -> Pending[tuple[Sums, RowsOf]]:
            sums = Sums(self.extract.images.name, self.sums, sums_device(self.extract.extractors))
            parts: dict[str, dict[str, list[Rows]]] = {
                network: {output: [] for output in outputs} for network, outputs in self.kept.items()
            }
            for number, found in Inline().map(_Prepared(self.name, self.device, begin), pieces, pulse):
                piece = pieces[number]
                sums.add(piece.begin, found)
                chosen = chosen_rows(self.rows, piece.begin, piece.end)
                for network, outputs in parts.items():
                    for output, kept in outputs.items():
                        kept.append(found[network][output][chosen])
            kept_rows = {
                network: {output: np.concatenate(arrays) for output, arrays in outputs.items()}
                for network, outputs in parts.items()
            }
            return Done((sums, kept_rows))

        return sum_up


class _Prepared(NamedTuple):
    """Work that has already been prepared."""

    name: str
    device: str
    begin: Callable[[Piece, Pulse], Pending[RowsOf]]

    def prepare(self) -> Callable[[Piece, Pulse], Pending[RowsOf]]:
        return self.begin


class Sums:
    """Moments of outputs, from rows added in the order of the images.

    Args:
        name: Name of the batch, for messages.
        widths: Width of each output, by network.
        device: Result of :func:`sums_device`.
    """

    def __init__(
        self, name: str, widths: Mapping[str, Mapping[str, int]], device: torch.device | None = None
    ) -> None:
        self._name = name
        self.widths = widths
        self._device = device
        self.moments = {
            network: {output: Moments(d, device) for output, d in outputs.items()}
            for network, outputs in widths.items()
        }

    def empty(self) -> Sums:
        """Empty sums of the same outputs."""
        return Sums(self._name, self.widths, self._device)

    def add(self, first: int, rows: RowsOf) -> None:
        """Add the rows of consecutive images.

        Raises:
            FeatureError: A value is not finite; the message says where.
        """
        for network, outputs in self.moments.items():
            for output, moments in outputs.items():
                check_rows(rows[network][output], f"{self._name}, {output}, counted from image {first}")
                moments.update(rows[network][output])

    def merge(self, other: Sums) -> None:
        """Add the sums of another object."""
        for network, outputs in self.moments.items():
            for output, moments in outputs.items():
                moments.merge(other.moments[network][output])


def chosen_rows(rows: NDArray[np.int64] | None, begin: int, end: int) -> slice | NDArray[np.int64]:
    """Those of the ascending ``rows`` in ``begin`` to ``end``, relative to ``begin``; None selects all."""
    if rows is None:
        return slice(None)
    first, last = np.searchsorted(rows, (begin, end))
    return rows[first:last] - begin
