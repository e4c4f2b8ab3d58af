"""What a metric is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from evalkit.features.record import BatchFeatures
from evalkit.results import Score, ScoreSpec
from evalkit.system.run import Run

__all__ = ["Metric", "Need", "parameters"]

Need: TypeAlias = Literal["rows", "gaussian"]
"""``rows`` are the features of every image. A ``gaussian`` comes from a file, or is summed up as
features stream past; a metric that needs one takes rows as well."""


@runtime_checkable
class Metric(Protocol):
    """A frozen dataclass whose fields are its parameters; calling it yields one score for each of `scores`.

    A metric that works on any network's rows has the fields ``output`` and ``scores``; then ``kid@dinov2`` is
    the same metric on the first output of that network (:func:`evalkit.metrics.named`).

    Attributes:
        scores: What it yields, in order.
        needs: What it needs of which output, ``{"inception:pool": "rows"}``. Nothing else is kept for it.
        uses_reference: Whether the reference matters. Inception Score and the like look at the samples alone.

    Optional: an attribute ``working_bytes``, the memory it takes beyond the rows, in bytes per number of a
    row; and a method ``streamed()``, the variant that reports how Gaussians were computed.
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
