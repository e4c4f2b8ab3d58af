"""What is in a batch: arrays, labels, statistics and provenance; and what is unusual about its images."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import ImageError, InputError
from evalkit.features.adm_npz import written_images
from evalkit.images import ImageSource, are_ids, is_pattern, open_images
from evalkit.images.chosen import chosen_images
from evalkit.images.npz import array_header
from evalkit.images.reading import readable
from evalkit.report.image_grid import base_name, write_grid
from evalkit.system.progress import Progress
from evalkit.system.storage import Place, file_or_path, place_of

__all__ = ["Contents", "Finding", "check", "contents", "describe", "draw", "label_counts"]

BATCH = 64
# A class with less than this share of the average class is nearly empty.
NEARLY_EMPTY = 0.1
# JPEG's blocks are 8 pixels wide. Their edges show when neighbouring columns differ more there than
# elsewhere: by more than chance (standard errors) and by more than a trace (share of the usual difference).
JPEG_BLOCK = 8
JPEG_STANDARD_ERRORS = 5.0
JPEG_SHARE = 0.02
LISTED = 5
SCORES = {"mu": "FID", "mu_s": "sFID", "mu_dinov2": "FD-DINOv2"}
MOST_BAD = 100
MOST_BARS = 20


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file holds, according to its headers.

    Attributes:
        arrays: (key, dtype, shape) of each array of an npz, in its order; empty for other containers.
        images: The images, or None if the file holds none that a metric could use.
        problem: Why ``images`` is None.
    """

    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]
    images: ImageSource | None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something unusual about a batch.

    Attributes:
        what: What was found, with the first indices.
        meaning: What it does to the metrics.
        indices: The images concerned; empty if it is the whole batch.
    """

    what: str
    meaning: str
    indices: tuple[int, ...] = field(default=())


def contents(path: str | PathLike[str]) -> Contents:
    """Arrays and images of any file that :func:`evalkit.images.open_images` reads, or of any npz.

    Raises:
        InputError: Neither, or damaged.
    """
    arrays: list[tuple[str, str, tuple[int, ...]]] = []
    place = None if is_pattern(path) else place_of(path)
    if place is not None and not place.is_dir() and _is_zip(place):
        with readable(str(place)), file_or_path(place) as file, zipfile.ZipFile(file) as archive:
            for key in (name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")):
                header = array_header(str(place), archive, key, any_type=True)
                arrays.append((key, str(header.dtype), header.shape))
    try:
        # Values of any range are accepted here, so that unusual ones can be inspected.
        return Contents(arrays=tuple(arrays), images=open_images(path, value_range="0..255"))
    except InputError as error:
        if not arrays:
            raise
        return Contents(arrays=tuple(arrays), images=None, problem=str(error))


def _is_zip(place: Place) -> bool:
    if isinstance(place, Path) and not place.is_file():
        return False
    with file_or_path(place) as file:
        return zipfile.is_zipfile(file)


def describe(found: Contents) -> str:
    """What is in a file, as text."""
    lines = [f"{key:<12} {dtype:<10} {shape}" for key, dtype, shape in found.arrays]
    images = found.images
    if images is None:
        return "\n".join([*lines, f"no images: {found.problem}"])
    if images.shape:
        height, width, _ = images.shape
        article = "an" if images.kind[0] in "nha" else "a"  # an npz, an HDF5 file, an array
        lines.append(
            f"{len(images):,} images of {width}x{height}, {images.dtype}, in {article} {images.kind}"
        )
    lines.append(_describe_labels(images))
    lines.append(_describe_statistics(images))
    lines += [f"note: {note}" for note in images.notes]
    if images.provenance and set(images.provenance) != {"statistics"}:  # EDM2 says how many images alone
        lines += ["made by evalkit:", json.dumps(_shortened(images.provenance), indent=1)]
    return "\n".join(lines)


def _describe_labels(images: ImageSource) -> str:
    if images.labels is None:
        return "no labels"
    counts = label_counts(images.labels)
    if odd := _no_classes(images.labels):
        return odd
    text = f"{len(counts):,} classes of {min(counts.values()):,} to {max(counts.values()):,} images"
    if len(counts) > MOST_BARS:
        return text
    longest = max(counts.values())
    bars = [
        f"  {label:>4} {count:>7,} {'#' * round(40 * count / longest)}" for label, count in counts.items()
    ]
    return "\n".join([text, *bars])


def _no_classes(labels: NDArray[np.int64]) -> str | None:
    """Why labels are not classes counted from 0; None if they may be."""
    low, high = int(labels.min()), int(labels.max())
    if low >= 0 and not are_ids(labels):
        return None
    kind = "some are negative" if low < 0 else "they look like ids or seeds"
    return f"{len(np.unique(labels)):,} different labels from {low} to {high}: not class numbers ({kind})"


def _describe_statistics(images: ImageSource) -> str:
    if not images.statistics:
        return "no statistics: FID and sFID use the images"
    counted = written_images(images)
    of = "of an unknown number of images" if counted is None else f"of {counted:,} images"
    used = [score for key, score in SCORES.items() if key in images.statistics]
    return f"statistics {of}: {' and '.join(used)} {'use' if len(used) > 1 else 'uses'} these"


def _shortened(value: Any) -> Any:
    """A copy with long lists cut, such as the names of a thousand classes."""
    if isinstance(value, Mapping):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list) and len(value) > LISTED:
        return [*value[:LISTED], f"... {len(value) - LISTED:,} more"]
    return value


def draw(images: ImageSource, path: Place, count: int) -> None:
    """Write a PNG grid of ``count`` images, evenly spaced over the batch.

    Raises:
        ImageError: One of these images is invalid.
        OutputError: The file cannot be written.
    """
    indices = np.linspace(0, len(images) - 1, min(len(images), count)).round().astype(int).tolist()
    chosen = chosen_images(images, indices)
    name = base_name(images.name)
    write_grid(
        path,
        np.rint(chosen).astype(np.uint8),
        title=f"Images of {name}",
        description=f"{len(chosen):,} of the {len(images):,} images of {name}, evenly spread over it.",
    )


def label_counts(labels: NDArray[np.int64]) -> dict[int, int]:
    """How many images each class that occurs has, by class."""
    classes, counts = np.unique(labels, return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


def check(images: ImageSource, progress: Progress | None = None) -> list[Finding]:
    """Check every image of a batch.

    Args:
        images: Opened by :func:`evalkit.images.open_images`.
        progress: Called with (stage, done, total).

    Returns:
        What is unusual, the most important first; empty if nothing is.
    """
    look = _Look(images)
    bad: dict[int, InputError] = {}
    for first, batch in _batches(images):
        if progress:
            progress(f"images of {images.name}", first, len(images))
        if isinstance(batch, InputError):
            bad[first] = batch
            if len(bad) == MOST_BAD or not isinstance(batch, ImageError):
                break
        else:
            look.take(first, batch)
    if progress:
        progress(f"images of {images.name}", len(images), len(images))
    found = []
    if bad:
        first = min(bad)
        stopped = "" if max(bad) == len(images) - 1 or len(bad) < MOST_BAD else "; the rest was not checked"
        found.append(
            Finding(
                what=f"{_many(bad, 'image', len(bad))} cannot be used{stopped}. The first: {bad[first]}",
                meaning="No metric is computed from a file with such images.",
                indices=tuple(bad),
            )
        )
    return found + look.findings()


def _batches(images: ImageSource) -> Iterator[tuple[int, NDArray[Any] | InputError]]:
    """Yields (index of the first, images), and (index, error) for an image that is bad."""
    first = 0
    while first < len(images):
        try:
            with closing(images.batches(BATCH, start=first)) as batches:
                for batch in batches:
                    yield first, batch
                    first += len(batch)
        except ImageError:
            for index in range(first, min(first + BATCH, len(images))):
                try:
                    with closing(images.batches(1, start=index)) as single:
                        yield index, next(single)
                except ImageError as error:
                    yield index, error
            first += BATCH
        except InputError as error:  # the container itself
            yield first, error
            return


class _Look:
    """What is collected while the images stream past."""

    def __init__(self, images: ImageSource) -> None:
        self.images = images
        self.first_of: dict[bytes, int] = {}
        self.duplicates: list[tuple[int, int]] = []
        self.constant: list[int] = []
        self.largest = 0.0
        self.steps = [_BlockEdges(axis) for axis in (1, 2)]

    def take(self, start: int, batch: NDArray[Any]) -> None:
        flat = batch.reshape(len(batch), -1)
        low, high = flat.min(axis=1), flat.max(axis=1)
        self.largest = max(self.largest, float(high.max()))
        self.constant += (np.flatnonzero(low == high) + start).tolist()
        for index, image in enumerate(flat, start):
            first = self.first_of.setdefault(hashlib.blake2b(image.data, digest_size=16).digest(), index)
            if first != index:
                self.duplicates.append((index, first))
        for edges in self.steps:
            edges.take(batch)

    def findings(self) -> list[Finding]:
        images, found = self.images, []
        if images.dtype == np.float32:
            found.append(
                Finding(
                    what="the file holds floats",
                    meaning="They are used unrounded, where published samples are 8-bit: save uint8.",
                )
            )
        if images.dtype == np.float32 and 0 < self.largest < 16:
            found.append(
                Finding(
                    what=f"no value is above {self.largest:.3g}",
                    meaning="Scaled for a network, it seems: as pixels from 0 to 255 they are all black.",
                )
            )
        if images.dtype == np.uint8 and 0 < self.largest <= 2:
            found.append(
                Finding(
                    what=f"no value is above {self.largest:g}",
                    meaning="Floats in [0, 1] were cut to integers: all but black. Multiply by 255 before.",
                )
            )
        if self.constant:
            found.append(
                Finding(
                    what=f"{_many(self.constant, 'image', len(self.constant))} of one colour only",
                    meaning="They look like failed samples. They raise FID, and each is a mode to recall.",
                    indices=tuple(self.constant),
                )
            )
        if self.duplicates:
            pairs = ", ".join(f"{index} = {first}" for index, first in self.duplicates[:LISTED])
            more = ", ..." if len(self.duplicates) > LISTED else ""
            found.append(
                Finding(
                    what=f"{len(self.duplicates):,} exact duplicates: {pairs}{more}",
                    meaning="The batch is smaller than it says, and the balls of nearest neighbours around "
                    "copies are smaller too: precision or recall drop.",
                    indices=tuple(index for index, _ in self.duplicates),
                )
            )
        found += self._labels()
        if (share := max(edges.share for edges in self.steps)) > JPEG_SHARE:
            found.append(
                Finding(
                    what=f"the edges of JPEG's 8x8 blocks show (steps {share:.0%} larger there)",
                    meaning="The images were stored as JPEG at this size. FID against uncompressed "
                    "images is worse just because of the compression.",
                )
            )
        return found

    def _labels(self) -> list[Finding]:
        if self.images.labels is None:
            return []
        counts = label_counts(self.images.labels)
        if odd := _no_classes(self.images.labels):
            return [
                Finding(
                    what=odd,
                    meaning="No metric uses labels, but sampling and training take them for classes from 0. "
                    "Save the classes as arr_1, or leave it out.",
                )
            ]
        mean = len(self.images) / len(counts)
        few = [label for label, count in counts.items() if count < NEARLY_EMPTY * mean]
        found = []
        absent = max(counts) + 1 - len(counts)
        if few:
            found.append(
                Finding(
                    what=f"{_many(few, 'class', len(few))} with less than a tenth of the average {mean:.0f} "
                    "images",
                    meaning="Recall is hardly tested there. Published batches draw labels uniformly.",
                )
            )
        if absent:
            found.append(
                Finding(
                    what=f"{_many(_absent(counts), 'class', absent)} below {max(counts)} without an image",
                    meaning="FID and recall count absent classes of the other batch as lost modes.",
                )
            )
        return found


class _BlockEdges:
    """How much more neighbouring pixels differ across the edges of JPEG's blocks than inside them."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.steps: list[NDArray[np.float64]] = []

    def take(self, batch: NDArray[Any]) -> None:
        blocks = (batch.shape[self.axis] - 1) // JPEG_BLOCK
        if blocks < 1:
            return
        grey = np.moveaxis(batch.mean(axis=3, dtype=np.float32), self.axis, 1)
        steps = np.abs(np.diff(grey, axis=1)).mean(axis=2, dtype=np.float64)[:, : blocks * JPEG_BLOCK]
        self.steps.append(steps.reshape(len(batch), blocks, JPEG_BLOCK).mean(axis=1))

    @property
    def share(self) -> float:
        """The excess at block edges, relative to other steps; 0 if it could be chance."""
        steps = np.concatenate(self.steps) if self.steps else np.zeros((0, JPEG_BLOCK))
        if len(steps) < 2:
            return 0.0
        inside = steps[:, :-1].mean(axis=0)
        excess = steps[:, -1] - steps[:, inside.argmax()]
        chance = JPEG_STANDARD_ERRORS * excess.std(ddof=1) / len(excess) ** 0.5
        return float(excess.mean() / inside.max()) if excess.mean() > chance else 0.0


def _absent(labels: Collection[int]) -> Iterator[int]:
    """Classes below the largest label that do not occur; there may be many millions of them."""
    return (label for label in range(max(labels)) if label not in labels)


def _many(indices: Iterable[int], noun: str, count: int) -> str:
    """How many there are, and the first of them."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    listed = ", ".join(map(str, islice(indices, LISTED))) + (", ..." if count > LISTED else "")
    return f"{count:,} {noun if count == 1 else plural} ({listed})"
