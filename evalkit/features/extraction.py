"""From images to features: one decoding pass for all networks, kept in the store on the way.

The main path is :class:`Extraction`. Images are taken a shard of 512 at a time: beyond what is kept of it,
memory does not grow with the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, UndefinedMetricError
from evalkit.extractors.base import Extractor, Rows
from evalkit.features.adm_npz import read_gaussians
from evalkit.features.moments import Gaussian, Moments, check_rows
from evalkit.features.record import Features
from evalkit.features.shards import Shard, Shards
from evalkit.features.store import StoredBatch, spans
from evalkit.images import ImageSource
from evalkit.system.run import Run
from evalkit.system.team_engine import Arrays

__all__ = ["Extraction", "Wanted", "derive", "extract", "first_features", "outputs_of"]

GROUP = 64
"""Shards whose moments are summed up before they are merged with others': 32,768 images."""


def outputs_of(extractor: Extractor) -> tuple[str, ...]:
    """All outputs, computed from images and derived."""
    return (*extractor.outputs, *extractor.derived)


def derive(
    extractor: Extractor, outputs: Iterable[str], arrays: Mapping[str, Rows]
) -> tuple[dict[str, Rows], dict[str, str]]:
    """Rows of derived outputs from those that they follow from; and by output, why the rest are absent."""
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
    """What is wanted of one network.

    Attributes:
        extractor: The network.
        arrays: Outputs of which rows are kept.
        moments: Outputs whose mean and covariance over all images are wanted, unless the file has its own.
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
    """Features of a batch through one network; what the store has is not computed again.

    Args:
        images: The batch.
        extractor: The network.
        outputs: Of which rows are kept; None for all.
        rows: (m,) ascending indices of the images whose rows are kept; None for all.
        moments: Outputs whose mean and covariance over all images are wanted, unless the file has its own.
        run: Store, progress and engine.
        **how: Fields of a run, in place of ``run=``.

    Raises:
        InputError: The images are bad; the message names the first.
        OutputError: The store cannot be written. What was extracted before stays.
    """
    arrays = outputs_of(extractor) if outputs is None else outputs
    wanted = Wanted(extractor=extractor, arrays=arrays, moments=moments)
    return Extraction(images, [wanted], rows=rows, run=Run.of(run, how)).features()[0]


class Extraction:
    """Features of one batch of images through one or more networks, from one decoding pass.

    Args:
        images: The batch.
        wanted: What of which network.
        rows: (m,) ascending indices of the images whose rows are kept; None for all.
        run: Store, progress and engine. Where the engine has several processes, each has the rows that it
            asks for; the moments, for which all must ask, are rank 0's alone.
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
        self._run = run
        self._rows = rows
        self._parts = [_Part(images, each, rows) for each in wanted]

    def extract_missing(self) -> None:
        """Put into the store what it does not have of any of the networks, whoever needs it.

        What other processes are doing is not waited for.
        """
        self._with_shards(self._parts, lambda shards: shards.extract_missing(wait=False))

    def features(self) -> list[Features]:
        """The features, in the order of what is wanted.

        Raises:
            InputError: The images are bad; the message names the first.
            OutputError: The store cannot be written. What was extracted before stays.
            WorkerError: Another process that shares the work died, failed or hangs.
        """
        needed = [part for part in self._parts if part.is_needed]
        self._with_shards(needed, lambda shards: self._collect(shards, needed))
        return [part.features() for part in self._parts]

    def _with_shards(self, parts: Sequence[_Part], work: Callable[[Shards], object]) -> None:
        if not parts or not len(self._images):
            return
        wanted = {part.extractor: part.read_outputs for part in parts}
        with contextlib.closing(Shards(self._images, wanted, self._run)) as shards:
            if shards.is_anything_missing():
                self.origin = "extracted"
            work(shards)

    def _collect(self, shards: Shards, parts: Sequence[_Part]) -> None:
        shards.extract_missing()

        def keep(number: int, shard: Shard) -> None:
            for part in parts:
                part.keep(*shards.spans[number], shard[part.network])

        has_moments = any(part.new_moments for part in parts)
        if has_moments:
            for part, found in zip(parts, _moments(shards, parts, keep), strict=True):
                part.gaussians |= found
        # Where processes share the moments, each has seen a part of the rows.
        if any(part.arrays for part in parts) and (self._run.engine.size > 1 or not has_moments):
            for number in range(len(shards.spans)):
                keep(number, shards.read(number))


class _Part:
    """What is collected of one network."""

    def __init__(self, images: ImageSource, wanted: Wanted, rows: NDArray[np.int64] | None):
        self.extractor = extractor = wanted.extractor
        self.network = extractor.network
        self.gaussians: dict[str, Gaussian] = read_gaussians(images, self.network)
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
        return bool(self.arrays or self.new_moments)

    @property
    def read_outputs(self) -> dict[str, int]:
        """Widths of the outputs that are read from a shard."""
        wanted = {*self.arrays, *self.new_moments}
        return {output: d for output, d in self.extractor.outputs.items() if output in wanted}

    def keep(self, begin: int, end: int, shard: Mapping[str, Rows]) -> None:
        for output, array in self.arrays.items():
            if self._rows is None:
                array[begin:end] = shard[output]
            else:
                first, last = np.searchsorted(self._rows, (begin, end))
                array[first:last] = shard[output][self._rows[first:last] - begin]

    def features(self) -> Features:
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
    """Features of the first ``count`` images, or of all where there are fewer, as a batch of their own.

    They are read from the store where it has them. Otherwise they are extracted, and not kept.

    Raises:
        InputError: The images are bad; the message names the first.
    """
    count = min(count, len(images))
    end = spans(len(images))[0][1]
    found: Mapping[str, Rows] | None = None
    if run.store_folder and count <= end:
        shapes = {output: (end, d) for output, d in extractor.outputs.items()}
        found = StoredBatch(run.store_folder, images, extractor).read(0, shapes)
    if found is None:
        with contextlib.closing(images.batches(count)) as batches:
            found = extractor(next(batches))
    arrays = {output: found[output][:count] for output in extractor.outputs}
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
        count=count,
    )


def _moments(
    shards: Shards, parts: Sequence[_Part], also: Callable[[int, Shard], object]
) -> list[dict[str, Gaussian]]:
    """Gaussians of new outputs over the whole batch, for each part; ``also`` is shown each shard.

    Groups of shards are summed up one by one and then merged in order: the result has the same bits whichever
    process did which.
    """
    groups = [range(len(shards.spans))[first : first + GROUP] for first in range(0, len(shards.spans), GROUP)]
    keys = [(part, output) for part in parts for output in part.new_moments]

    def sum_up(index: int) -> Arrays:
        sums = {(part.network, output): Moments(part.new_moments[output]) for part, output in keys}
        for number in groups[index]:
            shard = shards.read(number)
            also(number, shard)
            for (network, output), moments in sums.items():
                first = shards.spans[number][0]
                rows = shard[network][output]
                check_rows(rows, f"{shards.name}, {output}, counted from image {first}")
                moments.update(rows)
            shards.report_read(number)
        return {
            f"{network}:{output}.{key}": array
            for (network, output), moments in sums.items()
            for key, array in moments.state().items()
        }

    engine = shards.run.engine
    results = engine.map(f"moments-{shards.key}", len(groups), sum_up)
    if engine.rank:
        return [{} for _ in parts]
    total = {(part.network, output): Moments(part.new_moments[output]) for part, output in keys}
    for result in results:
        for (network, output), moments in total.items():
            other = Moments(moments.dimensions)
            other.restore({key: result[f"{network}:{output}.{key}"] for key in ("n", "mean", "scatter")})
            moments.merge(other)
    return [{output: total[part.network, output].gaussian() for output in part.new_moments} for part in parts]
