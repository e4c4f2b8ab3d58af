"""Which images cost most: the samples that raise FID most, and the reference images covered least."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from evalkit.comparison.networks import settle_statistics
from evalkit.comparison.pairs import Measured
from evalkit.comparison.plan import Choice, Subset
from evalkit.comparison.sources import Opened, file_outputs, widths_of
from evalkit.deviations import Influence
from evalkit.errors import InputError, UndefinedMetricError, brief
from evalkit.extractors.base import Extractor
from evalkit.images import ImageSource
from evalkit.images.chosen import chosen_images
from evalkit.metrics.frechet import is_rank_deficient
from evalkit.report.image_grid import Block, base_name, write_sheet
from evalkit.results import NOT_REQUESTED
from evalkit.system.storage import Place

__all__ = ["check_worst", "no_images", "shown_images", "write_worst"]

SCORE = "fid"


def check_worst(
    count: int,
    samples: Opened,
    choice: Choice,
    *,
    subset: Subset | None = None,
    error_bars: bool = True,
    reference: Opened | None = None,
    extractors: Iterable[Extractor] = (),
) -> None:
    """Cheap check before the long work that there will be something to show.

    Args:
        count: Of :func:`write_worst`; the others are those of :func:`evalkit.comparison.measure`.
        samples: Likewise.
        choice: Likewise.
        subset: Likewise.
        error_bars: Likewise.
        reference: Likewise; None where its number of images is not to be checked.
        extractors: The networks, which know how many features each image has. Without them, whether there are
            enough images is not checked.

    Raises:
        InputError: There will be nothing, or nothing is asked for.
    """
    if count < 1:
        raise InputError(f"The {count} images that cost most: expected at least 1, such as 64.")
    if why := no_images(samples):
        raise InputError(f"Which images cost most cannot be shown: {why}. Give the images as samples.")
    metrics = [metric for metric in choice.metrics if SCORE in (spec.name for spec in metric.scores)]
    if not metrics:
        raise InputError("Which images cost most is computed from FID; add fid to the metrics.")
    if subset is not None:
        raise InputError(
            "Which images cost most is computed from the features of all images, but with a subset FID is "
            "summed up in constant memory; leave out the subset."
        )
    if not error_bars:
        raise InputError("Which images cost most is computed with the error bars; do not leave them out.")
    outputs = {output for metric in metrics for output in metric.needs}
    settle_statistics([samples, *([] if reference is None else [reference])], choice.networks)
    if outputs & file_outputs(samples):
        raise InputError(
            "Which images cost most is computed from the features of all images, but "
            f"{brief(samples.name, 200)} carries mean and covariance, which FID uses instead. "
            "Give the images without statistics."
        )
    widths = widths_of((), {each.network: each for each in extractors})
    for source in (samples,) if reference is None else (reference, samples):
        for output in outputs - file_outputs(source):
            if output in widths and is_rank_deficient(len(source), widths[output]):
                raise InputError(
                    "Which images cost most can only be computed if no covariance is singular. "
                    f"{brief(source.name, 200)} holds {len(source):,} images, and each has "
                    f"{widths[output]:,} features: give more images than features."
                )


def write_worst(path: Place, count: int, reference: Opened, samples: Opened, measured: Measured) -> list[str]:
    """Write a PNG of the images that cost most in FID, the worst first, each above its index.

    Above, the samples of the largest positive influence on FID: with less weight on one of them, FID falls.
    Below, the images of the reference of the largest one: the samples cover them least. Those that lower FID
    are left out. Influence values are first derivatives: they do not say what leaving out many would do.

    Args:
        path: The file; see :func:`evalkit.report.image_grid.check_picture`.
        count: How many of each side, at most.
        reference: Where its images cannot be shown, they are left out.
        samples: Images.
        measured: Of these two, with FID, on all images and with their features kept
            (:func:`evalkit.comparison.measure` with ``keep_rows``, without a subset).

    Returns:
        What is left out and why, a sentence each.

    Raises:
        InputError: The samples are features or statistics alone, or have changed since.
        UndefinedMetricError: FID has no influence values; the message says why.
        OutputError: The file cannot be written.
    """
    if why := no_images(samples):
        raise InputError(f"Which images cost most cannot be shown: {why}. Give the images as samples.")
    influence = _influence(measured)
    indices = influence.costliest(count, higher_is_better=False)
    what = "samples in {name} that raise FID most, the worst first"
    blocks = [_block(samples, influence.samples, indices, what)]
    left_out = []
    if why := influence.no_reference if influence.reference is None else no_images(reference):
        left_out.append(f"The images of the reference that are covered least are not shown: {why}.")
    else:
        indices = influence.costliest(count, higher_is_better=False, of_reference=True)
        what = "images in {name} that the samples cover least, the worst first"
        blocks.append(_block(reference, influence.reference, indices, what))
    write_sheet(
        path,
        blocks,
        title="The images that cost most in FID",
        description=f"{'; '.join(block.heading for block in blocks)}. FID of {base_name(samples.name)} "
        f"against {base_name(reference.name)}; each image is above its index.",
    )
    return left_out


def no_images(source: Opened) -> str:
    """Why the images of a source cannot be shown; empty if they can."""
    if not isinstance(source, ImageSource):
        return f"{source.name} holds features and no images"
    return "" if len(source) else f"{source.name} holds statistics and no images"


def shown_images(images: ImageSource, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(n, height, width, 3) the images of these indices, for a sheet.

    Raises:
        InputError: The source has changed since it was opened.
    """
    pixels: NDArray[np.uint8] = np.rint(chosen_images(images, indices.tolist())).astype(np.uint8)
    images.check_unchanged(every_file=True)
    return pixels


def _influence(measured: Measured) -> Influence:
    score = measured.comparison.score(SCORE)
    if score is None:
        why = f"FID was not computed: {measured.comparison.missing.get(SCORE, NOT_REQUESTED)}"
    elif isinstance(found := measured.deviations.get(SCORE), Influence):
        return found
    else:
        why = f"FID has no error bar: {score.no_stderr or 'error bars were not requested'}"
    raise UndefinedMetricError(f"Which images cost most is not known. {why}.")


def _block(
    images: Opened, values: NDArray[np.float64] | None, indices: NDArray[np.int64], what: str
) -> Block:
    assert isinstance(images, ImageSource)
    assert values is not None
    if len(values) != len(images):
        raise InputError(
            f"FID is of {len(values):,} images, and {images.name} holds {len(images):,}; give all of them."
        )
    indices = indices[values[indices] > 0]  # the others lower FID
    if not len(indices):
        raise UndefinedMetricError(
            f"No image of {images.name} raises FID: all have the same influence on it."
        )
    return Block(
        heading=f"{len(indices):,} of {len(images):,} {what.format(name=base_name(images.name))}",
        images=shown_images(images, indices),
        captions=[str(index) for index in indices],
    )
