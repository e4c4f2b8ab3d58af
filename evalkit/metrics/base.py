"""What a metric is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evalkit.deviations import Deviations, Excess, Influence, balanced_classes
from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.features.moments import check_rows
from evalkit.features.record import BatchFeatures, split_output
from evalkit.results import Score, ScoreSpec
from evalkit.system.run import Run

__all__ = [
    "LABELS_NEEDED",
    "Metric",
    "Need",
    "check_directions",
    "check_sides",
    "classes_of",
    "influence_of",
    "labels_of",
    "parameters",
    "scores_at",
    "with_classes",
    "with_error_bars",
]

Need: TypeAlias = Literal["rows", "gaussian"]
"""``rows`` are the features of every image. A ``gaussian`` comes from a file, or is summed up as
features stream past; a metric that needs one takes rows as well."""

LABELS_NEEDED = (
    "scores within classes need the class of every image: give images with labels, such as arr_1 of an npz "
    "or dataset.json in a folder"
)
"""What to do about a batch without labels."""


@runtime_checkable
class Metric(Protocol):
    """A frozen dataclass whose fields are its parameters; calling it yields one score for each of `scores`.

    A metric that works on any network's rows has the fields ``output`` and ``scores``; then ``kid@dinov2`` is
    the same metric on the first output of that network (:func:`evalkit.metrics.named`). Metrics of protocols
    have the field ``scores``.

    Attributes:
        scores: What it yields, in order.
        needs: What it needs of which output, ``{"inception:pool": "rows"}``. Nothing else is kept for it.
        uses_reference: Whether the reference matters. Inception Score and the like look at the samples alone.

    Optional: an attribute ``working_bytes``, the memory it takes beyond the rows, in bytes per number of a
    row; an attribute ``finds_copies``, true where the reference's own images are the worst samples; a method
    ``streamed()``, the variant that reports how Gaussians were computed; and a method
    ``influence(reference, samples, run)``, which gives for each score by name how it deviates
    (:class:`~evalkit.deviations.Influence` or :class:`~evalkit.deviations.HalfSplit`), and raises
    UndefinedMetricError where that cannot be said. Error bars and tests of differences follow from it.
    Their memory beyond the rows is said by a method ``influence_bytes(images, width)``, with the number of
    images of each side. ``depends_on_order = True`` says that images are drawn by index, and
    ``needs_labels = True`` that both sides need labels (:func:`labels_of`).
    """

    @property
    def scores(self) -> tuple[ScoreSpec, ...]: ...  # noqa: D102 - described above
    @property
    def needs(self) -> Mapping[str, Need]: ...  # noqa: D102
    @property
    def uses_reference(self) -> bool: ...  # noqa: D102

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, /, run: Run) -> tuple[Score, ...]:
        """The scores of ``samples`` against ``reference``.

        Raises:
            UndefinedMetricError: The input gives the metric no value; it is never reported as a number.
            FeatureError: The sides do not fit together.
        """


def parameters(metric: Any) -> dict[str, Any]:
    """The fields of a metric, for the record; its ``scores`` are recorded elsewhere."""
    return {field.name: getattr(metric, field.name) for field in fields(metric) if field.name != "scores"}


def scores_at(scores: Sequence[ScoreSpec], where: str) -> tuple[ScoreSpec, ...]:
    """The scores of a metric at another network or of another protocol: ``fid@where``."""
    return tuple(
        replace(spec, name=f"{spec.name}@{where}", title=f"{spec.title} ({where})") for spec in scores
    )


def check_sides(
    reference: NDArray[np.floating], samples: NDArray[np.floating], what: str, *, least: int = 2
) -> None:
    """Check features that are to be compared.

    Args:
        reference: (m, d) float features.
        samples: (n, d) float features.
        what: What is computed, such as ``"a kernel distance"``.
        least: Images that each side needs.

    Raises:
        UndefinedMetricError: A side has fewer rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
    """
    for name, rows in (("reference", reference), ("samples", samples)):
        check_rows(rows, name)
        if len(rows) < least:
            images = f"{len(rows)} image{'' if len(rows) == 1 else 's'}"
            raise UndefinedMetricError(f"{what} of {images} ({name}) is undefined; give at least {least}")
    if reference.shape[1] != samples.shape[1]:
        raise FeatureError(
            f"features of {reference.shape[1]} and of {samples.shape[1]} dimensions cannot be compared; "
            "use the same output of the same network for both"
        )


def check_directions(rows: NDArray[np.floating], name: str) -> None:
    """Raise an UndefinedMetricError for features that are all zero, which cannot be brought to length 1."""
    some = rows.any(axis=1)
    if not some.all():
        raise UndefinedMetricError(
            f"the features of image {int(some.argmin())} ({name}) are all zero, and have no direction; leave "
            "this image out, or use another network"
        )


def influence_of(
    metric: Metric, reference: BatchFeatures, samples: BatchFeatures, run: Run
) -> dict[str, Deviations | str]:
    """How each score of a metric deviates, by name; or why that cannot be said."""
    names = [spec.name for spec in metric.scores]
    if not hasattr(metric, "influence"):
        return dict.fromkeys(names, "this metric has no standard error")
    try:
        found: Mapping[str, Deviations] = metric.influence(reference, samples, run)
    except UndefinedMetricError as error:
        return dict.fromkeys(names, str(error))
    return dict(found)


def with_error_bars(score: Score, found: Deviations | str) -> Score:
    """The score with standard errors and unbiased value, or with the reason why there are none."""
    if isinstance(found, str):
        return replace(score, no_stderr=found)
    if not all(map(math.isfinite, (found.stderr, found.stderr_reference or 0, found.bias or 0))):
        return replace(score, no_stderr="the features are too large for it: a sum of squares overflows")
    return replace(
        score,
        stderr=found.stderr,
        stderr_sampling=found.stderr_sampling,
        stderr_reference=found.stderr_reference,
        unbiased=None if found.bias is None else score.value - found.bias,
        n=found.images,
    )


def labels_of(batch: BatchFeatures, output: str) -> NDArray[np.int64]:
    """(n,) class of each image of an output's rows, for metrics that need it.

    Raises:
        UndefinedMetricError: The batch has no labels, or rows of some of its images alone.
    """
    network, key = split_output(output)
    labels, count = batch.networks[network].labels, len(batch.networks[network].arrays[key])
    if labels is None:
        raise UndefinedMetricError(f"{batch.name} has no labels; {LABELS_NEEDED}")
    if len(labels) != count:
        raise UndefinedMetricError(
            f"{batch.name} has labels of {len(labels):,} images, and features of {count:,} of these; leave "
            "out the subset"
        )
    return labels


def classes_of(batch: BatchFeatures, output: str, count: int) -> NDArray[np.int64] | None:
    """The class of each of ``count`` images, if every class has the same number of them; else None."""
    labels = batch.networks[split_output(output)[0]].labels
    return balanced_classes(labels) if labels is not None and len(labels) == count else None


def with_classes(
    found: Influence, reference: BatchFeatures, samples: BatchFeatures, output: str
) -> Influence:
    """The influence values with the classes of both sides, where these are balanced."""
    classes = classes_of(samples, output, len(found.samples))
    of_reference = None if found.reference is None else classes_of(reference, output, len(found.reference))
    if classes is None and of_reference is None:
        return found
    # That of pairs within classes is not known; without it, the error is not too small.
    return replace(found, classes=classes, reference_classes=of_reference, excess=Excess())
