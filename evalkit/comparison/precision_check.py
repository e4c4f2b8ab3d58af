"""How much a reduced precision changes scores and features, compared with float32 on the first images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evalkit.comparison.sources import Opened, Source, open_source
from evalkit.errors import UndefinedMetricError
from evalkit.extractors.base import Extractor, ReducedPrecision
from evalkit.features.extraction import first_features
from evalkit.features.record import BatchFeatures
from evalkit.images import ImageSource
from evalkit.metrics.base import Metric
from evalkit.system.run import Run

__all__ = ["check_features", "check_scores", "reduced_precision"]

# The first images of a side are measured again: at most MOST, and LEAST because metrics look at 3 neighbours.
# Between these it is one image in SHARE: float32 takes up to 6 times as long, which makes 5 % of the run.
LEAST, MOST, SHARE = 4, 128, 120


def reduced_precision(extractor: Extractor) -> str | None:
    """The precision of an extractor that does not run in float32; None where it does."""
    found = isinstance(extractor, ReducedPrecision) and extractor.precision != "float32"
    return str(getattr(extractor, "precision")) if found else None  # noqa: B009 - narrowed above


def check_scores(
    sources: Sequence[Opened],
    extractors: Mapping[str, Extractor],
    metrics: Sequence[Metric],
    run: Run,
) -> dict[str, Any]:
    """The scores of the first images of both batches, in float32 and in the precision in use.

    Returns:
        ``{"images": [n, m], "float32": {score: value}, <precision>: {score: value}}``; empty in float32, and
        where a side is no images.
    """
    reduced = {reduced_precision(extractor) for extractor in extractors.values()} - {None}
    images = [source for source in sources if isinstance(source, ImageSource) and len(source) > 3]
    if not reduced or len(images) < len(sources):
        return {}
    count = _count(images)
    found: dict[str, Any] = {"images": [min(len(source), count) for source in images]}
    in_float32 = {network: _in_float32(extractor) for network, extractor in extractors.items()}
    for precision, networks in (("float32", in_float32), (" and ".join(map(str, reduced)), extractors)):
        reference, samples = (
            BatchFeatures.of(
                *(first_features(source, extractor, count, run=run) for extractor in networks.values())
            )
            for source in images
        )
        found[precision] = {}
        for metric in metrics:
            try:
                scores = metric(reference, samples, run)
            except UndefinedMetricError:  # it is not in the comparison either
                continue
            found[precision] |= {score.name: score.value for score in scores}
    return found


def check_features(images: Source, extractor: Extractor, run: Run) -> tuple[int, dict[str, float]]:
    """How far a reduced precision moves the features of the first images of a batch.

    Args:
        images: The batch; where it is features already, nothing is looked at.
        extractor: The network, of which precision.
        run: Its store is read, if it has them.

    Returns:
        How many images were looked at, 0 where the precision is not reduced; and by output, the root mean
        square of the difference from float32 as a share of that of the float32 features.

    Raises:
        InputError: The images are bad.
    """
    if reduced_precision(extractor) is None:
        return 0, {}
    source = open_source(images)
    if not isinstance(source, ImageSource) or not len(source):
        return 0, {}
    exact, reduced = (
        first_features(source, candidate, _count([source]), run=run)
        for candidate in (_in_float32(extractor), extractor)
    )
    norm = np.linalg.norm
    return len(exact), {
        output: float(norm(reduced.arrays[output] - exact.arrays[output]) / norm(exact.arrays[output]))
        for output in extractor.outputs
    }


def _count(sources: Sequence[ImageSource]) -> int:
    """How many of the first images of each side are measured again."""
    images = sum(map(len, sources)) // len(sources)
    return max(LEAST, min(MOST, images // SHARE))


def _in_float32(extractor: Extractor) -> Extractor:
    return extractor.at_precision("float32") if isinstance(extractor, ReducedPrecision) else extractor
