"""The features of a batch, a shard at a time: from the store, or from one decoding pass for all networks.

A shard is cut into the same forward passes whatever the store had before and however many processes share the
work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from evalkit.errors import InputError
from evalkit.extractors.base import Extractor
from evalkit.features import store
from evalkit.features.pipeline import BegunShard, Pipeline, Shard
from evalkit.features.store import StoredBatch, spans
from evalkit.images import ImageSource
from evalkit.system.run import Run

__all__ = ["Shard", "Shards"]


class Shards:
    """A batch's features a shard at a time: from the store, where there is one, or from the networks."""

    def __init__(self, images: ImageSource, wanted: Mapping[Extractor, Mapping[str, int]], run: Run):
        """Prepare the store.

        Args:
            images: The batch.
            wanted: By network, the outputs that are read, and their widths.
            run: Store, progress and engine.
        """
        self.spans = spans(len(images))
        self.run = run
        self._images = images
        self._extractors = tuple(wanted)
        self._outputs = {extractor.network: outputs for extractor, outputs in wanted.items()}
        names = ", ".join(self._outputs)
        self._report = run.report(f"{names} features of {images.name}")
        self._report_moments = run.report(f"mean and covariance of the images of {images.name}")
        # What is in memory is hashed in no time.
        images.identify(None if images.kind == "array" else run.engine.watched(run.progress))
        self._stored: dict[str, StoredBatch] = {}
        if (root := run.store_folder) is not None:
            self._stored = {each.network: StoredBatch(root, images, each) for each in wanted}
            if not images.shows_changes() and not all(each.is_complete() for each in self._stored.values()):
                # What is read now may be something else than what was hashed.
                self._stored = {}
                if run.engine.size > 1:
                    raise InputError(
                        f"{images.name}: the server gives no version of it, so its features are not stored, "
                        "and several processes cannot share the work. Download it first and give the local "
                        "path, or use one process."
                    )
            for stored in self._stored.values():
                stored.prepare()
        # Powers of two, like a shard, so that no forward pass goes over the end of one.
        self._batch_sizes = {
            each.network: min(store.SHARD, 1 << (each.batch_size.bit_length() - 1)) for each in wanted
        }
        self._batches: Generator[NDArray[Any], None, None] | None = None
        self._position = 0
        self._done = 0
        self._ahead: BegunShard | None = None

    @property
    def name(self) -> str:
        """That of the images."""
        return self._images.name

    @property
    def key(self) -> str:
        """Names this batch with these networks; different for any other."""
        return "-".join(stored.folder.name for stored in self._stored.values())

    def is_anything_missing(self) -> bool:
        """Whether images have to be decoded."""
        return not self._stored or bool(self._missing())

    def extract_missing(self, *, wait: bool = True) -> None:
        """Extract what the store does not have; wait for what other processes do, or not."""
        if not self._stored:
            return
        locks = next(iter(self._stored.values())).folder / "claims.lock"
        written: list[tuple[StoredBatch, int]] = []

        def write(begun: BegunShard, shard: Shard) -> None:
            for extractor in begun.extractors:
                stored = self._stored[extractor.network]
                stored.write(begun.number, shard[extractor.network])
                written.append((stored, begun.number))

        pipeline = Pipeline(write)

        # A claim ends before its shard is written, and so another process may take it, too, when nothing else
        # is left for it. It writes the same features.
        def missing() -> list[int]:
            return sorted({*self._missing()} - {*pipeline.numbers})

        with pipeline, contextlib.closing(self.run.engine.claims(locks, missing)) as claims:
            for number in claims:
                self._count(missing())
                if number is not None:
                    due = [
                        each for each in self._extractors if number in self._stored[each.network].missing()
                    ]
                    pipeline.add(self._begin(number, due))
                elif not wait:
                    break
                else:
                    pipeline.drain()
        try:
            if written:
                self._images.check_unchanged(every_file=True)
        except InputError:
            for stored, number in written:  # they may be of other images than those that were hashed
                stored.remove(number)
            raise
        self._count(self._missing())

    def read(self, number: int) -> Shard:
        """The rows of a shard, of the outputs that are wanted."""
        if not self._stored:
            return self._extract_ahead(number)
        begin, end = self.spans[number]
        shard: Shard = {}
        for extractor in self._extractors:
            network = extractor.network
            stored = self._stored[network]
            shapes = {output: (end - begin, d) for output, d in self._outputs[network].items()}
            found = stored.read(number, shapes)
            if found is None:
                # Damaged by something other than us: the checksums noticed.
                stored.remove(number)
                self._count(self._missing())
                found = self._begin(number, [extractor]).result()[network]
                if self._images.shows_changes():
                    stored.write(number, found)
                self._count(self._missing())
            shard[network] = found
        return shard

    def report_read(self, number: int) -> None:
        """Report that a shard has been read; without a store that is reported as it is extracted."""
        if self._stored:
            self._report_moments(self.spans[number][1], len(self._images))

    def close(self) -> None:
        """End the stream of images."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _missing(self) -> list[int]:
        return sorted({number for stored in self._stored.values() for number in stored.missing()})

    def _extract_ahead(self, number: int) -> Shard:
        """Extract a shard; where a device runs ahead, begin the next one before its features are there."""
        begun, self._ahead = self._ahead, None
        if begun is None or begun.number != number:
            begun = self._begin(number, self._extractors)
        if not begun.done() and number + 1 < len(self.spans):
            self._ahead = self._begin(number + 1, self._extractors)
        return begun.result()

    def _begin(self, number: int, extractors: Sequence[Extractor]) -> BegunShard:
        """Read a shard's images and give them to the networks."""
        begin, end = self.spans[number]
        if self._batches is None or self._position != begin:
            self.close()
            self._batches = self._images.batches(max(self._batch_sizes.values()), start=begin)
            self._position = begin
        shard = BegunShard(number, end - begin, extractors)
        while self._position < end:
            self._report(self._done, len(self._images))
            batch = next(self._batches, None)
            if batch is None:
                raise InputError(
                    f"{self._images.name} ended at image {self._position}; "
                    f"expected {len(self._images)} images."
                )
            for extractor in extractors:
                size = self._batch_sizes[extractor.network]
                for first in range(0, len(batch), size):
                    shard.add(extractor, batch[first : first + size], self._position - begin + first)
            self._position += len(batch)
            self._done += len(batch)
        self._images.check_unchanged()  # what it is stored under was computed before
        self._report(self._done, len(self._images))
        return shard

    def _count(self, missing: Sequence[int]) -> None:
        """Report how much there is, if these shards are missing."""
        spans = (self.spans[number] for number in missing)
        self._done = len(self._images) - sum(end - begin for begin, end in spans)
        self._report(self._done, len(self._images))
