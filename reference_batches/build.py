"""A reference batch from your own images: ADM's preprocessing, a seeded choice, statistics of all of them.

The main path is :func:`build`. Images stream past once, a batch at a time: :mod:`reference_batches.work`
decodes and measures them, here or on workers. In the order of the images, features go into running moments;
the pixels of the chosen ones go into a file next to the result. Every half minute this is saved (see
:mod:`reference_batches.journal`), so that the same command resumes after an interruption and gives the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import ImageError, InputError, UndefinedMetricError
from evalkit.extractors.base import Extractor
from evalkit.features.adm_npz import OUTPUTS
from evalkit.features.moments import Moments
from evalkit.features.work import sums_device
from evalkit.images import (
    ImageFiles,
    ImageSource,
    NpzWriter,
    SupportsArray,
    ValueRange,
    check_range_used,
    is_pattern,
    open_image_files,
    open_images,
)
from evalkit.system.engine import Engine, Inline
from evalkit.system.files import check_writable, versions
from evalkit.system.identity import stamp
from evalkit.system.progress import Progress
from evalkit.system.storage import Place, place_of
from reference_batches.journal import FORMAT, Journal
from reference_batches.labels import ClassOrder, LabelsFrom, labels_of
from reference_batches.work import Cropping, Cut, Piece

__all__ = ["Report", "Settings", "build"]

BATCH_SIZE = 64

_MOST_EARLY = 2**16
"""Images whose results wait for those of images before them, about: 1 GB of Inception's features."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide the content of a reference batch.

    Attributes:
        size: Side of the square images, pixels.
        images: How many images to keep, drawn without replacement in random order; None keeps all, in the
            order of their names.
        seed: Random seed for drawing them.
        statistics: The images whose mean and covariance go into the file: ``all`` images of the source, as in
            the published references, those ``kept``, or ``none``.
        labels: Where classes come from; see :func:`reference_batches.labels.labels_of`.
        class_order: How the names of classes are sorted; see there.
    """

    size: int
    images: int | None = None
    seed: int = 0
    statistics: Literal["all", "kept", "none"] = "all"
    labels: LabelsFrom = "auto"
    class_order: ClassOrder = "text"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"Size {self.size}: expected the side of the images in pixels, at least 1.")
        if self.images is not None and self.images < 1:
            raise InputError(f"{self.images} images to keep: expected at least 1.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"Seed {self.seed}: expected 0 to {2**32 - 1}.")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What :func:`build` did.

    Attributes:
        path: The npz.
        kept: Number of images in it.
        classes: Number of their classes, or None if there are no labels.
        counted: Number of images in the statistics; 0 if there are none.
        bad: Why images were left out, one sentence each: they cannot be decoded.
        notes: What the user should know but is not an error, one sentence each.
    """

    path: Place
    kept: int
    classes: int | None
    counted: int
    bad: tuple[str, ...]
    notes: tuple[str, ...]


def build(
    source: str | os.PathLike[str] | SupportsArray,
    out: Place,
    settings: Settings,
    *,
    extractor: Extractor | None = None,
    skip_bad: bool = False,
    value_range: ValueRange | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Report:
    """Write a reference batch that the ADM reference evaluator reads as it is.

    The npz has ``arr_0`` (n, size, size, 3) uint8, ``arr_1`` (n,) int64 labels if there are any, ``mu,
    sigma, mu_s, sigma_s`` unless turned off, and two keys that the evaluator ignores: ``indices`` (n,)
    int64, the place of each image in the source, and ``provenance``, JSON. The same source and settings give
    the same bytes, whatever the number of workers, threads and interruptions.

    Args:
        source: A folder, zip, tar or parquet file of images of any size, or equally large images as
            :func:`evalkit.images.open_images` takes them.
        out: The npz. An existing one is replaced at the end; until then ``<out>.building`` holds the work, of
            a URL in the cache folder.
        settings: See :class:`Settings`.
        extractor: The network of the statistics; not needed without statistics.
        skip_bad: Leave out images that cannot be decoded, drawing others in their place, and do not stop.
        value_range: What a source of floats holds; see :func:`evalkit.images.open_images`.
        workers: Decoding threads of a process; None is one for each core.
        progress: Called with (stage, done, total).
        engine: Who decodes the images and measures them; None is this process.

    Raises:
        ImageError: An image cannot be decoded; the message names it.
        InputError: The source cannot be read or has too few images; or an unfinished build is in the way that
            has other settings or is damaged.
        OutputError: The file cannot be written, or there is too little space.
        UndefinedMetricError: Statistics of fewer than two images.
        WorkerError: A worker of the engine could not do its part.
    """
    check_writable(out, *([source] if isinstance(source, str | os.PathLike) else []))
    items = _open(source, value_range)
    if settings.statistics == "none":
        extractor = None
    elif extractor is None:
        raise ValueError("statistics need an extractor")
    with closing(_Builder(items, settings, extractor, out, engine or Inline(), workers)) as builder:
        builder.read(skip_bad, progress)
        builder.replace_bad()
        return builder.finish()


def _open(
    source: str | os.PathLike[str] | SupportsArray, value_range: ValueRange | None
) -> ImageFiles | ImageSource:
    """Image files of any size, or arrays of images of one size."""
    if isinstance(source, str | os.PathLike) and os.fspath(source) and not is_pattern(source):
        files = open_image_files(place_of(source))
        if files:
            check_range_used([files], value_range)
            return files
    images = open_images(source, value_range=value_range)
    check_range_used([images], value_range)
    if images.shape is None:
        raise InputError(f"{images.name}: holds statistics and no images; expected images.")
    return images


def _draw(n: int, settings: Settings) -> NDArray[np.int64]:
    """All indices, in the order in which images are kept."""
    if settings.images is None:
        return np.arange(n)
    if settings.images > n:
        raise InputError(f"{settings.images:,} images to keep of {n:,}: give at most that number.")
    # RandomState, because NumPy promises that its numbers never change.
    return np.random.RandomState(settings.seed).permutation(n).astype(np.int64)


class _Builder:
    """One build: the images to read, in order, the place of each in the result, and the journal."""

    def __init__(
        self,
        items: ImageFiles | ImageSource,
        settings: Settings,
        extractor: Extractor | None,
        out: Place,
        engine: Engine,
        threads: int | None,
    ) -> None:
        self.items, self.settings, self.extractor, self.out = items, settings, extractor, out
        self.engine, self.threads = engine, threads
        found = labels_of(items, settings.labels, settings.class_order)
        self.labels, self.classes, self.notes = found.labels, found.names, items.notes + found.notes
        drawn = _draw(len(items), settings)
        self.order, self.spare = np.split(drawn, [settings.images or len(drawn)])
        self.slots = {int(index): slot for slot, index in enumerate(self.order)}
        everything = extractor is not None and settings.statistics == "all"
        self.wanted = np.arange(len(items)) if everything else np.sort(self.order)
        if extractor and len(self.wanted) < 2:
            raise UndefinedMetricError(
                f"{items.name}: statistics of one image; a covariance needs two, and thousands to mean "
                "something. Give more images, or ask for no statistics."
            )
        device = sums_device([extractor] if extractor else [])
        moments = {layer: Moments(d, device) for layer, d in extractor.outputs.items()} if extractor else {}
        shape = (len(self.order), settings.size, settings.size, 3)
        self.journal = Journal(out, self._identity(), self.wanted, shape, moments)

    def read(self, skip_bad: bool, progress: Progress | None) -> None:
        """Read every wanted image that is not done: features into the moments, pixels into their slots."""
        stage, journal, begun = f"images of {self.items.name}", self.journal, self.journal.position

        def report(done: float) -> None:
            if progress:
                progress(stage, begun + int(done), len(self.wanted))

        report(0)
        with closing(self._cuts(self.wanted[begun:], self.extractor, report)) as cuts:
            for cut in cuts:
                if cut.bad and not skip_bad:
                    journal.save()
                    first = cut.bad[min(cut.bad)]
                    raise ImageError(f"{first}. Or leave such images out: --skip-bad resumes from here.")
                self._take(cut)
                journal.position += len(cut.digests)
                journal.save_if_due()

    def replace_bad(self) -> None:
        """Put the next images drawn in place of chosen ones that are bad; if all are kept, leave them out."""
        bad = self.journal.bad
        if self.settings.images is None:
            self.order = np.array([index for index in self.order.tolist() if index not in bad])
        gaps = [slot for slot, index in enumerate(self.order.tolist()) if index in bad]
        free, spare, found = gaps.copy(), iter(self.spare.tolist()), list[int]()
        while free and (drawn := list(islice(spare, len(free)))):
            self.slots |= {index: free.pop() for index in drawn}
            fresh = np.sort([index for index in drawn if index not in bad]).astype(np.int64)
            counted = self.settings.statistics == "all"
            with closing(self._cuts(fresh, None if counted else self.extractor)) as cuts:
                for cut in cuts:
                    self._take(cut)
            free += [self.slots[index] for index in drawn if index in bad]
            found += [index for index in drawn if index not in bad]
        self.order[gaps[: len(found)]] = found
        left = len(self.order) - len(free)
        if free or not left:
            raise ImageError(
                f"{self.items.name}: {len(bad):,} of {len(self.items):,} images cannot be decoded and "
                f"{left:,} are left. Keep fewer, or repair them. The first: {bad[min(bad)]}"
            )

    def finish(self) -> Report:
        """Write the npz, and remove the journal."""
        labels = None if self.labels is None else self.labels[self.order]
        size, moments, bad = self.settings.size, self.journal.moments, self.journal.bad
        with NpzWriter.create(self.out, (len(self.order), size, size, 3)) as writer:
            slots = [self.slots[index] for index in self.order.tolist()]
            for first in range(0, len(slots), BATCH_SIZE):
                writer.append(self.journal.take(slots[first : first + BATCH_SIZE]))
            if labels is not None:
                writer.add("arr_1", labels)
            for suffix, output in OUTPUTS.items():
                if output in moments:
                    writer.add(f"mu{suffix}", moments[output].mean)
                    writer.add(f"sigma{suffix}", moments[output].covariance)
            writer.add("indices", self.order)
            writer.add("provenance", np.array(json.dumps(self._provenance())))
        self.journal.remove()
        return Report(
            path=self.out,
            kept=len(self.order),
            classes=None if labels is None else len(np.unique(labels)),
            counted=moments["pool"].n if moments else 0,
            bad=tuple(bad[index] for index in sorted(bad)),
            notes=self.notes,
        )

    def close(self) -> None:
        """Free the lock, so that another process can resume the build."""
        self.journal.close()

    def _cuts(
        self,
        indices: NDArray[np.int64],
        extractor: Extractor | None,
        report: Callable[[float], object] | None = None,
    ) -> Generator[Cut, None, None]:
        """What becomes of the images with these ascending indices, in order, in the network's batch size."""
        size = self.extractor.batch_size if self.extractor else BATCH_SIZE
        work = Cropping(items=self.items, size=self.settings.size, extractor=extractor, threads=self.threads)
        begin = 0
        early: dict[int, Cut] = {}

        def pieces() -> Iterator[Piece]:
            for first in range(begin, len(indices), size):
                if len(early) * size > _MOST_EARLY:
                    return  # the rest is given out when the results of these are all there
                part = indices[first : first + size]
                yield Piece(part, np.array([index in self.slots for index in part.tolist()]))

        def report_all(done: float) -> None:
            if report:
                report(begin + done)

        with closing(work):
            while begin < len(indices):
                following = 0
                with closing(self.engine.map(work, pieces(), report_all)) as results:
                    for number, cut in results:
                        for index, pixels in cut.pixels.items():
                            self.journal.put(self.slots[index], pixels)
                        early[number] = replace(cut, pixels={})
                        while following in early:
                            yield early.pop(following)
                            following += 1
                begin += following * size

    def _take(self, cut: Cut) -> None:
        """Add the features of images to the moments, and note which of them are bad."""
        journal = self.journal
        for digest in cut.digests:
            journal.digest = hashlib.sha256(journal.digest + digest).digest()
        journal.bad |= cut.bad
        for layer, features in cut.features.items():
            journal.moments[layer].update(features)

    def _identity(self) -> dict[str, Any]:
        """What an unfinished build must share with the one that resumes it."""
        items = self.items
        if isinstance(items, ImageFiles):
            files, changed = stamp(items.paths())
            if changed == float("inf"):
                files = uuid.uuid4().hex  # a change would not show, so that no build is resumed
            source = hashlib.sha256(json.dumps([items.names, files]).encode()).hexdigest()
        else:  # where a change would not show, no build is resumed
            source = items.digest if items.shows_changes() else uuid.uuid4().hex
        return {
            "format": FORMAT,
            "source": source,
            "settings": asdict(self.settings),
            "extractor": self.extractor.fingerprint if self.extractor else None,
            "versions": versions("evalkit", "numpy", "pillow"),
        }

    def _provenance(self) -> dict[str, Any]:
        items, extractor, journal = self.items, self.extractor, self.journal
        return {
            "format": FORMAT,
            "source": {
                "name": Path(items.name).name,
                "kind": items.kind,
                "images": len(items),
                "images_read": len(self.wanted),
                "digest_of_images_read": journal.digest.hex(),
            },
            "settings": asdict(self.settings),
            "statistics": extractor
            and {
                "images": journal.moments["pool"].n,
                "extractor": extractor.name,
                "fingerprint": extractor.fingerprint,
                "preprocess": extractor.preprocess,
                "precision": getattr(extractor, "precision", "float32"),
            },
            "left_out": [journal.bad[index] for index in sorted(journal.bad)],
            "classes": self.classes,
            "versions": self._identity()["versions"],
        }
