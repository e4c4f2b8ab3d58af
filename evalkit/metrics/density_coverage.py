"""Density and coverage: how deep samples are in the reference, and how much of the reference has samples.

Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models". Unlike precision and
recall, both use balls around the reference alone, so that outliers among the samples do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.deviations import HalfSplit
from evalkit.errors import InputError
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import Need, check_sides, classes_of, parameters
from evalkit.metrics.halves import halves_bytes, halves_of_density_coverage
from evalkit.metrics.points import exact_sides
from evalkit.metrics.screening import Screening
from evalkit.metrics.search import Inside, counted, each_stripe, radii
from evalkit.results import Score, ScoreSpec
from evalkit.system.devices import float32_arithmetic, resolve_device
from evalkit.system.run import Run

__all__ = ["DensityCoverage", "density_coverage"]


def density_coverage(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    *,
    k: int = 5,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 3 and 4).

    A ball around an image of the reference reaches to its k-th nearest neighbour in the reference, itself not
    counted. Points on the sphere are outside, as in the authors' code. Squared distances ``|u - v|^2`` are
    compared in float64, and memory does not grow with the number of pairs.

    Args:
        reference: (m, d) float32 features.
        samples: (n, d) float32 features.
        k: The radius of a ball reaches to this nearest neighbour.
        device: torch device of the computation; mps, which has no float64, is replaced by the CPU.
        progress: Called with the rows done and the rows in total.

    Returns:
        The mean number of balls that a sample is in, over k: about 1 for samples like the reference, and not
        bounded by it. And the share of the reference whose ball has a sample in it.

    Raises:
        UndefinedMetricError: A side has no more than k rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
        InputError: ``k`` is below 1.
    """
    _check(reference, samples, k)
    target = torch.device("cpu" if device.startswith("mps") else device)
    # TF32 or bfloat16 products would break the margins of the screens.
    with torch.inference_mode(), float32_arithmetic():
        r, s = exact_sides(
            *(torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(target) for x in (reference, samples))
        )
        screening = Screening(r)
        advance = counted(2 * len(r.x), progress)
        balls = Inside(r, radii(r, k, screening, advance), s, screening)
        pairs, covered = 0, torch.zeros(len(r.x), dtype=torch.bool, device=target)
        for found in each_stripe(r, screening, balls.look, advance):
            for centre, point in found:
                pairs += len(point)
                covered[centre] = True
        return pairs / (k * len(s.x)), float(covered.double().mean())


@dataclass(frozen=True)
class DensityCoverage:
    """Density and coverage of the samples; see :func:`density_coverage`. Higher is better.

    Attributes:
        output: Of which network and output.
        k: Which nearest neighbour a ball reaches to.
        scores: Their names.
    """

    uses_reference: ClassVar[bool] = True
    # As precision and recall, which use the same search.
    working_bytes: ClassVar[float] = 8

    output: str = "inception:pool"
    k: int = 5
    scores: tuple[ScoreSpec, ...] = (
        ScoreSpec(name="density", title="Density", higher_is_better=True),
        ScoreSpec(name="coverage", title="Coverage", higher_is_better=True),
    )

    @property
    def needs(self) -> Mapping[str, Need]:
        """Rows of the output."""
        return {self.output: "rows"}

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """Two scores.

        Raises:
            UndefinedMetricError: A side has no such features, or no more than k images.
            FeatureError: The sides do not fit together.
        """
        values = density_coverage(
            reference.rows(self.output),
            samples.rows(self.output),
            k=self.k,
            device=run.device,
            progress=run.report(" and ".join(spec.name for spec in self.scores)),
        )
        return tuple(
            Score(name=spec.name, value=value, parameters=parameters(self))
            for spec, value in zip(self.scores, values, strict=True)
        )

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, HalfSplit]:
        """Both scores of halves; see :func:`~evalkit.metrics.halves.halves_of_density_coverage`.

        Raises:
            UndefinedMetricError: A side has no such features, or half of it has no more than k images.
            FeatureError: The sides do not fit together.
        """
        r, s = reference.rows(self.output), samples.rows(self.output)
        _check(r, s, self.k)
        found = halves_of_density_coverage(
            r,
            s,
            k=self.k,
            classes=classes_of(samples, self.output, len(s)),
            reference_classes=classes_of(reference, self.output, len(r)),
            device=resolve_device("cpu" if run.device.startswith("mps") else run.device),
        )
        return {spec.name: halves for spec, halves in zip(self.scores, found, strict=True)}

    def influence_bytes(self, images: Sequence[int], width: int) -> int:
        """Memory of :meth:`influence` beyond the rows."""
        return halves_bytes(images, width)


def _check(reference: NDArray[np.float32], samples: NDArray[np.float32], k: int) -> None:
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1, the nearest neighbour")
    check_sides(reference, samples, f"density and coverage with k = {k}", least=k + 1)
