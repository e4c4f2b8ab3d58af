"""Features of a batch in shards, from the store or from one decoding pass for all networks.

Workers may extract pieces, but only this process writes to the store. A shard is always split into the same
forward passes, whatever is already in the store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError
from evalkit.extractors.base import Extractor
from evalkit.features.pieces import Cutter, Piece
from evalkit.features.store import Span, StoredBatch, spans
from evalkit.features.work import Extract, pass_size
from evalkit.features.writer import RowsOf, Writer
from evalkit.images import ImageSource
from evalkit.system.run import Run

__all__ = ["Shards"]


class Shards:
    """Features of a batch in shards: from the store if there is one, otherwise from the networks."""

    def __init__(self, images: ImageSource, wanted: Mapping[Extractor, Mapping[str, int]], run: Run):
        """Prepare the store.

        Args:
            images: The batch.
            wanted: By network, the outputs to read and their widths.
            run: Store, progress and engine.
        """
        self.spans = spans(len(images))
        self.images = images
        self.run = run
        self._widths = {extractor.network: outputs for extractor, outputs in wanted.items()}
        self.work = Extract(images, tuple(wanted), {each.network: pass_size(each) for each in wanted})
        # Arrays in memory are hashed so fast that no progress is shown.
        images.identify(None if images.kind == "array" else run.progress)
        self._stored: dict[str, StoredBatch] = {}
        if (root := run.store_folder) is not None:
            self._stored = {each.network: StoredBatch(root, images, each) for each in wanted}
            if not images.shows_changes() and self.is_anything_missing():
                # The content may change between hashing and reading.
                self._stored = {}
            for stored in self._stored.values():
                stored.prepare()

    @property
    def is_stored(self) -> bool:
        """Whether the features are, or will be, in the store."""
        return bool(self._stored)

    def is_anything_missing(self) -> bool:
        """Whether any images have to be decoded."""
        return not self._stored or any(stored.missing().any() for stored in self._stored.values())

    def pieces(self, shards: list[Span]) -> list[Piece]:
        """Whole shards as pieces, for all networks; used without a store."""
        return [Piece(begin, end, tuple(self._widths)) for begin, end in shards]

    def reporter(self, there: int = 0) -> Callable[[float], None]:
        """A function that reports the number of images extracted, added to the ``there`` already stored."""
        report = self.run.report(f"{', '.join(self._widths)} features of {self.images.name}")
        n, last = len(self.images), -1

        def extracted(images: float) -> None:
            nonlocal last
            if there + int(images) != last:
                last = there + int(images)
                report(last, n)

        return extracted

    def extract_missing(self) -> None:
        """Extract the features that are missing from the store."""
        if not self._stored:
            return
        missing = {network: stored.missing() for network, stored in self._stored.items()}
        cutter = Cutter(max(self.work.batch_sizes.values()), missing)
        report = self.reporter(len(self.images) - cutter.images)
        report(0)
        written: list[Piece] = []

        def write(piece: Piece, rows: RowsOf) -> None:
            for network in piece.networks:
                self._stored[network].write((piece.begin, piece.end), rows[network])
            written.append(piece)

        results = self.run.engine.map(self.work, cutter.pieces(), report)
        try:
            with Writer(write) as writer, contextlib.closing(results):
                for number, rows in results:
                    writer.add(cutter.end(number), rows)
            report(cutter.images)
        except BaseException:
            # The files may have changed, but the original error is the one to report.
            with contextlib.suppress(InputError):
                self._check_unchanged(written)
            raise
        self._check_unchanged(written)

    def _check_unchanged(self, written: list[Piece]) -> None:
        """Remove stored features if the images changed after they were hashed."""
        try:
            if written:
                self.images.check_unchanged(every_file=True)
        except InputError:
            for piece in written:
                for network in piece.networks:
                    self._stored[network].remove((piece.begin, piece.end))
            raise

    def read(self, shard: Span) -> RowsOf:
        """Read the rows of a shard from the store, for the requested outputs."""
        rows: RowsOf = {}
        for network, outputs in self._widths.items():
            found = self._stored[network].read(shard, outputs)
            if found is None:  # damaged on disk, as the checksums show
                found = self._mend(network, shard)
            rows[network] = found
        return rows

    def _mend(self, network: str, shard: Span) -> dict[str, NDArray[np.float32]]:
        stored, outputs = self._stored[network], self._widths[network]
        stored.remove_damaged(shard, outputs)
        if self.images.shows_changes():
            self.extract_missing()
            if (found := stored.read(shard, outputs)) is not None:
                return found
        report = self.reporter(len(self.images) - (shard[1] - shard[0]))
        ((_, rows),) = self.run.engine.map(self.work, [Piece(*shard, (network,))], report)
        return rows[network]
