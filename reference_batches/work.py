"""What a build does with a few images at a time, in this process or on a worker: read, crop, measure."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalkit.errors import ImageError, InputError
from evalkit.extractors.base import Extractor, Rows
from evalkit.images import ImageFiles, ImageSource
from evalkit.system.engine import Pending, Pulse
from evalkit.system.stops import Stop
from reference_batches.crop import Crop, Pixels, crop

__all__ = ["Contents", "Cropping", "Cut", "Piece"]

_BATCH_SIZE = 64
"""Images that a source of arrays is read by."""

Content = tuple[str, bytes | Image.Image | InputError]
"""The name of an image for messages, and what its file holds or is."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Images that are read, and given to the network, together.

    Attributes:
        indices: (n,) ascending; their places in the source.
        chosen: (n,) bool; whose pixels are wanted.
    """

    indices: NDArray[np.int64]
    chosen: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """What became of a piece.

    Attributes:
        digests: Of each image; see :class:`reference_batches.crop.Crop`.
        bad: Why images have no pixels, by their place in the source.
        pixels: (size, size, 3) of the chosen images that are not bad, by their place in the source.
        features: (k, d) by output, of all images that are not bad; empty if there are none, or no network.
    """

    digests: Sequence[bytes]
    bad: Mapping[int, str]
    pixels: Mapping[int, Pixels]
    features: Mapping[str, Rows]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cropping:
    """A :class:`~evalkit.system.engine.Work` whose items are pieces of a source.

    Attributes:
        items: The source.
        size: Side of the crops, pixels.
        extractor: What measures them; None for pixels alone.
        threads: That decode, in each process; None is one for each core.
    """

    items: ImageFiles | ImageSource
    size: int
    extractor: Extractor | None
    threads: int | None = None
    _opened: list[_Cropper] = field(default_factory=list, init=False, repr=False)

    @property
    def name(self) -> str:
        """For messages."""
        return f"images of {self.items.name}"

    @property
    def device(self) -> str:
        """The network's."""
        return str(getattr(self.extractor, "device", "cpu"))

    def prepare(self) -> Callable[[Piece, Pulse], Pending[Cut]]:
        """What does a piece; it decodes the next one while the network has the last."""
        cropper = _Cropper(self)
        self._opened.append(cropper)
        return cropper

    def close(self) -> None:
        """Close the source and end the threads in this process."""
        while self._opened:
            self._opened.pop().close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": []}


class _Cropper:
    def __init__(self, work: Cropping) -> None:
        self._work = work
        self._contents = Contents(work.items)
        self._stop = Stop()
        # A single thread reads, because a container is read in its order.
        self._reader = ThreadPoolExecutor(1, "read", self._stop.put_on_thread)
        self._pool = ThreadPoolExecutor(work.threads or os.cpu_count(), "crop")

    def __call__(self, piece: Piece, pulse: Pulse) -> Pending[Cut]:
        crops = self._reader.submit(self._crop, piece.indices.tolist())
        return _Begun(piece, crops, self._work, pulse)

    def _crop(self, indices: list[int]) -> list[Future[Crop]]:
        size = self._work.size
        return [self._pool.submit(crop, *content, size) for content in self._contents.at(indices)]

    def close(self) -> None:
        self._stop.set()
        self._reader.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)
        self._contents.close()


class _Begun:
    """A piece that is decoded by threads; the network is given it when its result is asked for."""

    def __init__(self, piece: Piece, crops: Future[list[Future[Crop]]], work: Cropping, pulse: Pulse) -> None:
        self._piece, self._crops, self._work, self._pulse = piece, crops, work, pulse

    def done(self) -> bool:
        return False  # what is left to do is done where the result is asked for

    def result(self) -> Cut:
        crops = [future.result() for future in self._crops.result()]
        indices, extractor = self._piece.indices.tolist(), self._work.extractor
        bad, good, chosen = dict[int, str](), list[Pixels](), dict[int, Pixels]()
        for index, each, is_chosen in zip(indices, crops, self._piece.chosen.tolist(), strict=True):
            if isinstance(each.pixels, ImageError):
                bad[index] = str(each.pixels)
                continue
            good.append(each.pixels)
            if is_chosen:
                chosen[index] = each.pixels
        features: Mapping[str, Rows] = {}
        if extractor and good:
            self._pulse(len(crops) / 2)
            features = extractor(np.stack(good))
        self._pulse(len(crops))
        return Cut(digests=[each.digest for each in crops], bad=bad, pixels=chosen, features=features)


class Contents:
    """What the files of a source hold, asked for a few at a time: it stays open in between."""

    def __init__(self, items: ImageFiles | ImageSource) -> None:
        self._items = items
        self._asked: deque[int] = deque()
        self._stream: Generator[Any, None, None] | None = None
        self._position = 0
        """The image after the last one that was read."""
        self._batch: NDArray[Any] = np.empty(0)
        """The images before that one, of a source of arrays."""

    def at(self, indices: Sequence[int]) -> Iterator[Content]:
        """Yield these images, given by ascending index."""
        items = self._items
        try:
            if isinstance(items, ImageFiles):
                for name, content in self._files(items, indices):
                    yield f"{items.name}, {name}", content
            else:
                for index, pixels in self._arrays(items, indices):
                    yield f"{items.name}, image {index}", Image.fromarray(np.rint(pixels).astype(np.uint8))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the source; it may be asked again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._asked.clear()
        self._batch = self._batch[:0]

    def _files(self, items: ImageFiles, indices: Sequence[int]) -> Iterator[tuple[str, bytes | InputError]]:
        if self._stream is not None and indices and indices[0] < self._position:
            self.close()
        self._asked.extend(indices)
        for index in indices:
            # A reader that takes what is asked of it ahead is at its end, where there is more by now.
            found = next(self._stream, None) if self._stream is not None else None
            if found is None:
                self._stream = items.read(self._next_asked())
                found = next(self._stream)
            self._position = index + 1
            yield found

    def _next_asked(self) -> Iterator[int]:
        while self._asked:
            yield self._asked.popleft()

    def _arrays(self, items: ImageSource, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        for number, index in enumerate(indices):
            begin = self._position - len(self._batch)
            # What others do is passed over, unless that takes reading it, or it is little.
            gap, span = index - self._position, indices[-1] - index
            is_far = number == 0 and gap > span and not items.reads_in_order
            if index < begin or is_far:
                self.close()
                # They will do what follows, too: it is not read ahead.
                stop = None if items.reads_in_order else indices[-1] + 1
                self._stream = items.batches(_BATCH_SIZE, index, stop)
                self._position = index
            while index >= self._position:
                if self._stream is None or (batch := next(self._stream, None)) is None:
                    self._stream = items.batches(_BATCH_SIZE, self._position)
                    batch = next(self._stream)
                self._batch = batch
                self._position += len(batch)
            yield index, self._batch[index - self._position]
