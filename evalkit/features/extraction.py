"""Extract features from images, with one decoding pass for all networks, through the feature store.

The main path is :class:`Extraction`. Images are processed in shards of 512, so memory grows only with the
rows that are kept, not with the number of images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, UndefinedMetricError
from evalkit.extractors.base import Extractor, Rows
from evalkit.features.adm_npz import read_gaussians
from evalkit.features.moments import Gaussian
from evalkit.features.record import Features
from evalkit.features.shards import Shards
from evalkit.features.store import Span, StoredBatch, spans
from evalkit.features.work import Sums, SumUp, chosen_rows, sums_device
from evalkit.images import ImageSource
from evalkit.system.run import Run

__all__ = ["Extraction", "Part", "Wanted", "derive", "extract", "first_features", "outputs_of"]

GROUP = 64
"""Shards per group: moments are accumulated within a group, then groups are merged (32,768 images)."""


def outputs_of(extractor: Extractor) -> tuple[str, ...]:
    """All outputs: those computed from images, and derived ones."""
    return (*extractor.outputs, *extractor.derived)


def derive(
    extractor: Extractor, outputs: Iterable[str], arrays: Mapping[str, Rows]
) -> tuple[dict[str, Rows], dict[str, str]]:
    """Compute rows of derived outputs from their base outputs. Also, by output, why others are absent."""
    found: dict[str, Rows] = {}
    absent: dict[str, str] = {}
    for output in outputs:
        try:
            found[output] = extractor.derive(output, arrays[extractor.derived[output]])
        except UndefinedMetricError as error:
            absent[output] = str(error)
    return found, absent


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The features to extract with one network.

    Attributes:
        extractor: The network.
        arrays: Outputs whose rows are kept.
        moments: Outputs to compute mean and covariance of over all images, unless the file has them.
    """

    extractor: Extractor
    arrays: Collection[str] = ()
    moments: Collection[str] = ()


def extract(
    images: ImageSource,
    extractor: Extractor,
    *,
    outputs: Collection[str] | None = None,
    rows: NDArray[np.int64] | None = None,
    moments: Collection[str] = (),
    run: Run | None = None,
    **how: Any,
) -> Features:
    """Features of a batch from one network. Features in the store are not computed again.

    Args:
        images: The batch.
        extractor: The network.
        outputs: Outputs whose rows are kept; None for all.
        rows: (m,) ascending indices of the images whose rows are kept; None for all.
        moments: Outputs to compute mean and covariance of over all images, unless the file has them.
        run: Store, progress and engine.
        **how: Fields of a run, in place of ``run=``.

    Raises:
        InputError: An image is invalid; the message names the first one.
        OutputError: The store cannot be written. Features stored so far are kept.
    """
    arrays = outputs_of(extractor) if outputs is None else outputs
    wanted = Wanted(extractor=extractor, arrays=arrays, moments=moments)
    return Extraction(images, [wanted], rows=rows, run=Run.of(run, how)).features()[0]


class Extraction:
    """Features of one batch of images from one or more networks, in one decoding pass.

    Args:
        images: The batch.
        wanted: The features to extract, by network.
        rows: (m,) ascending indices of the images whose rows are kept; None for all.
        run: Store, progress and engine.
    """

    def __init__(
        self,
        images: ImageSource,
        wanted: Sequence[Wanted],
        *,
        rows: NDArray[np.int64] | None = None,
        run: Run,
    ):
        if not isinstance(images, ImageSource):
            raise InputError(
                f"extract takes images that are open, such as evalkit.open_images(...), not {images!r}."
            )
        self.origin: Literal["extracted", "stored"] = "stored"
        self._images = images
        self._wanted = wanted
        self._rows = rows
        self._run = run
        self._gaussians = [read_gaussians(images, each.extractor.network) for each in wanted]

    def features(self) -> list[Features]:
        """The features, in the order of ``wanted``. The arrays are not shared, so the caller may modify them.

        Raises:
            InputError: An image is invalid; the message names the first one.
            OutputError: The store cannot be written. Features stored so far are kept.
            WorkerError: The engine's workers failed repeatedly.
        """
        parts = [
            Part(self._images, each, self._rows, gaussians)
            for each, gaussians in zip(self._wanted, self._gaussians, strict=True)
        ]
        needed = [part for part in parts if part.is_needed]
        if needed:
            self._collect(self._shards(needed), needed)
        return [part.features() for part in parts]

    def _shards(self, parts: Sequence[Part]) -> Shards:
        shards = Shards(self._images, {part.extractor: part.read_outputs for part in parts}, self._run)
        if shards.is_anything_missing():
            self.origin = "extracted"
        return shards

    def _collect(self, shards: Shards, parts: Sequence[Part]) -> None:
        """Collect rows and moments. Fixed groups are merged in order, so sums do not depend on the engine."""
        widths = {part.network: part.new_moments for part in parts if part.new_moments}
        total = Sums(self._images.name, widths, sums_device(shards.work.extractors))
        if shards.is_stored:
            shards.extract_missing()
            self._read(shards, parts, total)
        elif widths:
            self._sum_up(shards, parts, total)
        else:
            pieces = shards.pieces(shards.spans)
            for number, rows in self._run.engine.map(shards.work, pieces, shards.reporter()):
                for part in parts:
                    part.keep(*shards.spans[number], rows[part.network])
        for part in parts:
            for output in part.new_moments:
                part.gaussians[output] = total.moments[part.network][output].gaussian()

    def _read(self, shards: Shards, parts: Sequence[Part], total: Sums) -> None:
        """Read rows from the store, and accumulate moments."""
        report = self._run.report(f"mean and covariance of the images of {self._images.name}")
        for group in _groups(shards):
            sums = total.empty()
            for begin, end in group:
                rows = shards.read((begin, end))
                for part in parts:
                    part.keep(begin, end, rows[part.network])
                sums.add(begin, rows)
                if total.moments:
                    report(end, len(self._images))
            total.merge(sums)

    def _sum_up(self, shards: Shards, parts: Sequence[Part], total: Sums) -> None:
        """Without a store: the engine accumulates moments, and returns only the rows that are kept."""
        groups = _groups(shards)
        kept = {part.network: tuple(part.arrays) for part in parts}
        work = SumUp(shards.work, total.widths, kept, self._rows)
        pieces = [shards.pieces(group) for group in groups]
        waiting: dict[int, Sums] = {}
        merged = 0
        for number, (sums, rows) in self._run.engine.map(work, pieces, shards.reporter()):
            for part in parts:
                part.put(groups[number][0][0], groups[number][-1][1], rows[part.network])
            waiting[number] = sums
            while merged in waiting:
                total.merge(waiting.pop(merged))
                merged += 1


def _groups(shards: Shards) -> list[list[Span]]:
    """Shards by group; sums are accumulated within a group."""
    return [shards.spans[first : first + GROUP] for first in range(0, len(shards.spans), GROUP)]


class Part:
    """The features collected from one network."""

    def __init__(
        self,
        images: ImageSource,
        wanted: Wanted,
        rows: NDArray[np.int64] | None,
        gaussians: Mapping[str, Gaussian],
    ):
        self.extractor = extractor = wanted.extractor
        self.network = extractor.network
        self.gaussians = dict(gaussians)
        self._images = images
        self._rows = rows
        self._derived = [output for output in wanted.arrays if output in extractor.derived]
        self._direct = [output for output in wanted.arrays if output in extractor.outputs]
        n = len(images)
        kept = {*self._direct, *(extractor.derived[output] for output in self._derived)}
        self.arrays = {
            output: np.empty((n if rows is None else len(rows), d), np.float32)
            for output, d in extractor.outputs.items()
            if n and output in kept
        }
        self.new_moments = {
            output: extractor.outputs[output]
            for output in wanted.moments
            if n and output not in self.gaussians
        }

    @property
    def is_needed(self) -> bool:
        """Whether anything has to be extracted."""
        return bool(self.arrays or self.new_moments)

    @property
    def read_outputs(self) -> dict[str, int]:
        """Widths of the outputs to read from each shard."""
        wanted = {*self.arrays, *self.new_moments}
        return {output: d for output, d in self.extractor.outputs.items() if output in wanted}

    def keep(self, begin: int, end: int, found: Mapping[str, Rows]) -> None:
        """Store the selected rows of these images."""
        chosen = chosen_rows(self._rows, begin, end)
        self.put(begin, end, {output: found[output][chosen] for output in self.arrays})

    def put(self, begin: int, end: int, kept: Mapping[str, Rows]) -> None:
        """Store rows of these images that are already selected."""
        if self._rows is not None:
            begin, end = np.searchsorted(self._rows, (begin, end))
        for output, array in self.arrays.items():
            array[begin:end] = kept[output]

    def features(self) -> Features:
        """The features, once all rows and Gaussians are complete."""
        images, extractor = self._images, self.extractor
        arrays: dict[str, Rows] = {key: self.arrays[key] for key in self._direct if key in self.arrays}
        if not len(images):
            reason = f"{images.name} is statistics alone; this needs the images, or features kept of them"
            absent = dict.fromkeys(outputs_of(extractor), reason)
        else:
            derived, absent = derive(extractor, self._derived, self.arrays)
            arrays |= derived
        return Features(
            name=images.name,
            digest=images.digest,
            network=extractor.network,
            extractor=extractor.name,
            fingerprint=extractor.fingerprint,
            arrays=arrays,
            gaussians=self.gaussians,
            absent=absent,
            image_shape=images.shape,
            labels=images.labels,
            count=len(images),
        )


def first_features(images: ImageSource, extractor: Extractor, count: int, *, run: Run) -> Features:
    """Features of the first ``count`` images, or of all if there are fewer, as a separate batch.

    Read from the store if possible. Otherwise they are extracted, but not stored.

    Raises:
        InputError: An image is invalid; the message names the first one.
    """
    count = min(count, len(images))
    end = spans(len(images))[0][1]
    found: Mapping[str, Rows] | None = None
    if run.store_folder and count <= end:
        found = StoredBatch(run.store_folder, images, extractor).read((0, count), extractor.outputs)
    if found is None:
        with contextlib.closing(images.batches(count)) as batches:
            found = extractor(next(batches))
    arrays = {output: found[output] for output in extractor.outputs}
    derived, absent = derive(extractor, extractor.derived, arrays)
    return Features(
        name=images.name,
        digest="",
        network=extractor.network,
        extractor=extractor.name,
        fingerprint=extractor.fingerprint,
        arrays=arrays | derived,
        absent=absent,
        image_shape=images.shape,
        labels=None if images.labels is None else images.labels[:count],
        count=count,
    )
