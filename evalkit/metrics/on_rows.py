"""What metrics on the rows of one output have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.deviations import Deviations, HalfSplit, Influence
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import Need, classes_of, parameters, with_classes
from evalkit.metrics.halves import halves_bytes
from evalkit.metrics.kept import Kept
from evalkit.results import Score, ScoreSpec
from evalkit.system.devices import float64_device
from evalkit.system.run import Run

__all__ = ["ByHalves", "Computed", "ComputedOnce", "OnRows"]

Rows = NDArray[np.float32]


class OnRows:
    """A metric of the rows of one output; its class is a frozen dataclass with these two fields.

    Attributes:
        output: Of which network and output.
        scores: Names of its scores.
    """

    output: str
    scores: tuple[ScoreSpec, ...]

    uses_reference: ClassVar[bool] = True

    @property
    def needs(self) -> Mapping[str, Need]:
        """Rows of the output."""
        return {self.output: "rows"}

    def report(self, run: Run) -> Callable[[int, int], None]:
        """What reports (done, total) of its computation."""
        return run.report(" and ".join(spec.name for spec in self.scores))


class Computed(NamedTuple):
    """A score with its influence values.

    Attributes:
        value: The score.
        influence: Of it.
        std: Over the metric's own splits, where it has splits.
        parameters: What the record has beside, or in place of, the fields of the metric.
    """

    value: float
    influence: Influence
    std: float | None = None
    parameters: Mapping[str, Any] = {}


# By reference, samples and metric; the call and the influence values both need it.
_COMPUTED: Kept[Kept[Computed]] = Kept()


class ComputedOnce(OnRows, ABC):
    """A metric with one score, whose value and influence values come from the same computation."""

    @abstractmethod
    def compute(self, reference: Rows, samples: Rows, run: Run) -> Computed:
        """The score of (n, d) rows against (m, d) ones.

        Raises:
            UndefinedMetricError: Rows give it no value.
            FeatureError: The sides do not fit together.
        """

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """One score.

        Raises:
            UndefinedMetricError: A side has no such features, or these give it no value.
            FeatureError: The sides do not fit together.
        """
        found = self._computed(reference, samples, run)
        recorded = parameters(self) | dict(found.parameters)
        return (Score(name=self.scores[0].name, value=found.value, std=found.std, parameters=recorded),)

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, Deviations]:
        """Influence values of the score; errors as for the score."""
        found = self._computed(reference, samples, run).influence
        return {self.scores[0].name: with_classes(found, reference, samples, self.output)}

    def _computed(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> Computed:
        def make() -> Computed:
            return self.compute(reference.rows(self.output), samples.rows(self.output), run)

        return _COMPUTED.of(reference, None, Kept).of(samples, self, make)


class ByHalves(OnRows, ABC):
    """A metric that decides by nearest neighbours, with error bars from :mod:`evalkit.metrics.halves`."""

    # Measured of precision and recall: 3.5 to 5.6, more where bfloat16 does not suffice.
    working_bytes: ClassVar[float] = 8

    @abstractmethod
    def values(
        self, reference: Rows, samples: Rows, *, device: str, progress: Callable[[int, int], object]
    ) -> Sequence[float]:
        """The scores, in order.

        Raises:
            UndefinedMetricError: There are too few rows.
            FeatureError: The sides do not fit together.
        """

    @abstractmethod
    def halves(
        self,
        reference: Rows,
        samples: Rows,
        *,
        classes: NDArray[np.int64] | None,
        reference_classes: NDArray[np.int64] | None,
        device: torch.device,
    ) -> Sequence[HalfSplit]:
        """The scores of halves, in order; arguments as of the functions in :mod:`evalkit.metrics.halves`.

        Raises:
            UndefinedMetricError: Half of a side has too few rows.
            FeatureError: The sides do not fit together.
        """

    def rows(self, reference: BatchFeatures, samples: BatchFeatures) -> tuple[Rows, Rows]:
        """(m, d) and (n, d) rows from which scores and halves are computed; here, those of all images.

        Raises:
            UndefinedMetricError: A side has no such features.
        """
        return reference.rows(self.output), samples.rows(self.output)

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """Its scores.

        Raises:
            UndefinedMetricError: A side has no such features, or too few images.
            FeatureError: The sides do not fit together.
        """
        sides = self.rows(reference, samples)
        values = self.values(*sides, device=run.device, progress=self.report(run))
        return tuple(
            Score(name=spec.name, value=value, parameters=parameters(self))
            for spec, value in zip(self.scores, values, strict=True)
        )

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, Deviations]:
        """Its scores of halves.

        Raises:
            UndefinedMetricError: A side has no such features, or half of it has too few images.
            FeatureError: The sides do not fit together.
        """
        r, s = self.rows(reference, samples)
        found = self.halves(
            r,
            s,
            # None if the rows belong to a subset of the images: then classes are not balanced.
            classes=classes_of(samples, self.output, len(s)),
            reference_classes=classes_of(reference, self.output, len(r)),
            device=float64_device(run.device),
        )
        return {spec.name: halves for spec, halves in zip(self.scores, found, strict=True)}

    def influence_bytes(self, images: Sequence[int], width: int) -> int:
        """Memory of :meth:`influence` beyond the rows."""
        return halves_bytes(images, width)
