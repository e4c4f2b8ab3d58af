"""The samples nearest to images of the reference, side by side: whether they are copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from evalkit.comparison.pairs import Measured
from evalkit.comparison.plan import Subset
from evalkit.comparison.sources import Opened
from evalkit.comparison.worst import no_images, shown_images
from evalkit.errors import InputError, UndefinedMetricError
from evalkit.features.record import BatchFeatures
from evalkit.images import ImageSource
from evalkit.metrics.authenticity import closest_pairs
from evalkit.metrics.base import Metric
from evalkit.report.image_grid import Block, base_name, write_sheet
from evalkit.results import ClosePair
from evalkit.system.run import Run
from evalkit.system.storage import Place

__all__ = ["check_nearest", "find_nearest", "write_nearest"]


def check_nearest(count: int, reference: Opened, samples: Opened, *, subset: Subset | None = None) -> None:
    """Cheap check before the long work that there will be something to show.

    Args:
        count: Of :func:`write_nearest`, also for the others.
        reference: Likewise.
        samples: Likewise.
        subset: Of :func:`evalkit.comparison.measure`.

    Raises:
        InputError: There will be nothing, or nothing is asked for.
    """
    if count < 1:
        raise InputError(f"The {count} closest pairs: expected at least 1, such as 64.")
    _check_images(reference, samples)
    for source in (reference, samples):
        if len(source) < 2:
            raise InputError(f"{source.name} holds 1 image; for the closest pairs, give at least 2 a side.")
    if subset is not None:
        raise InputError("The closest pairs are those of all images; leave out the subset.")


def _check_images(*sources: Opened) -> None:
    for source in sources:
        if why := no_images(source):
            raise InputError(f"The closest pairs cannot be shown: {why}. Give the images of both sides.")


def find_nearest(
    count: int, metrics: Sequence[Metric], features: Sequence[BatchFeatures], run: Run
) -> dict[str, tuple[ClosePair, ...]]:
    """The closest pairs, by the output that their features are of; empty if no metric has features of both.

    Args:
        count: How many pairs.
        metrics: The first output that one of them needs, and that both sides have, is used.
        features: Of reference and samples.
        run: Device and progress.
    """
    for output in dict.fromkeys(output for metric in metrics for output in metric.needs):
        try:
            reference, samples = (side.rows(output) for side in features)
        except UndefinedMetricError:
            continue
        progress = run.report("closest pairs")
        return {output: closest_pairs(reference, samples, count, device=run.device, progress=progress)}
    return {}


def write_nearest(path: Place, reference: Opened, samples: Opened, measured: Measured) -> None:
    """Write a PNG of the closest pairs: each sample, and on its right the nearest image of the reference.

    Below each pair are both indices, the distance of their features, and its ratio to the distance from that
    image to the nearest other image of the reference. With a ratio below 1, none of these is as near to it as
    the sample.

    Args:
        path: The file; see :func:`evalkit.report.image_grid.check_picture`.
        reference: Images. To find copies, these have to be the training images.
        samples: Images.
        measured: Of these two (:func:`evalkit.comparison.measure` with ``nearest``, without a subset).

    Raises:
        InputError: A side has no images, or has changed since.
        UndefinedMetricError: The pairs are not known.
        OutputError: The file cannot be written.
    """
    _check_images(reference, samples)
    assert isinstance(reference, ImageSource)
    assert isinstance(samples, ImageSource)
    for output, pairs in measured.comparison.closest.items():
        left = shown_images(samples, np.array([pair.sample for pair in pairs]))
        right = shown_images(reference, np.array([pair.reference for pair in pairs]))
        if left.shape != right.shape:
            size = left.shape[2], left.shape[1]
            right = np.stack([np.asarray(Image.fromarray(each).resize(size)) for each in right])
        names = base_name(samples.name), base_name(reference.name)
        what = (
            f"The {len(pairs):,} of {len(samples):,} samples in {names[0]} that are nearest to an image of "
            f"{names[1]}"
        )
        how = (
            f"distance in {output}",
            f"its ratio to the distance from the right image to the nearest other image of {names[1]}",
        )
        block = Block(
            heading=f"{what}\nLeft, right: index, index; {how[0]};\n{how[1]}",
            images=np.concatenate([left, right], axis=2),
            captions=[_caption(pair) for pair in pairs],
        )
        write_sheet(
            path,
            [block],
            title="The closest pairs of samples and reference",
            description=f"{what}; each with that image on its right. Below: their indices, {how[0]}, and "
            f"{how[1]}. With a ratio below 1, none of these is as near as the sample.",
        )
        return
    raise UndefinedMetricError("The closest pairs are not known: no metric has features of both sides.")


def _caption(pair: ClosePair) -> str:
    ratio = "" if pair.ratio is None else f", ratio {pair.ratio:.2f}"
    return f"{pair.sample}, {pair.reference}\n{pair.distance:.4g}{ratio}"
