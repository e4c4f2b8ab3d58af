"""Density and coverage: how deep samples are in the reference, and how much of the reference has samples.

Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models". Unlike precision and
recall, both use balls around the reference alone, so that outliers among the samples do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.deviations import HalfSplit
from evalkit.errors import InputError
from evalkit.metrics.base import check_sides
from evalkit.metrics.halves import halves_of_density_coverage
from evalkit.metrics.on_rows import ByHalves
from evalkit.metrics.points import exact_sides, on_device
from evalkit.metrics.screening import Screening
from evalkit.metrics.search import Inside, counted, each_stripe, radii
from evalkit.results import ScoreSpec
from evalkit.system.devices import float32_arithmetic

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
    # TF32 or bfloat16 products would break the margins of the screens.
    with torch.inference_mode(), float32_arithmetic():
        r, s = exact_sides(*on_device(device, reference, samples))
        screening = Screening(r)
        advance = counted(2 * len(r.x), progress)
        balls = Inside(r, radii(r, k, screening, advance), s, screening)
        pairs, covered = 0, torch.zeros(len(r.x), dtype=torch.bool, device=r.x.device)
        for found in each_stripe(r, screening, balls.look, advance):
            for centre, point in found:
                pairs += len(point)
                covered[centre] = True
        return pairs / (k * len(s.x)), float(covered.double().mean())


@dataclass(frozen=True)
class DensityCoverage(ByHalves):
    """Density and coverage of the samples; see :func:`density_coverage`. Higher is better.

    Attributes:
        output: Of which network and output.
        k: Which nearest neighbour a ball reaches to.
        scores: Their names.
    """

    output: str = "inception:pool"
    k: int = 5
    scores: tuple[ScoreSpec, ...] = (
        ScoreSpec(name="density", title="Density", higher_is_better=True),
        ScoreSpec(name="coverage", title="Coverage", higher_is_better=True),
    )

    def values(
        self,
        reference: NDArray[np.float32],
        samples: NDArray[np.float32],
        *,
        device: str,
        progress: Callable[[int, int], object],
    ) -> tuple[float, float]:
        """See :func:`density_coverage`."""
        return density_coverage(reference, samples, k=self.k, device=device, progress=progress)

    def halves(
        self,
        reference: NDArray[np.float32],
        samples: NDArray[np.float32],
        *,
        classes: NDArray[np.int64] | None,
        reference_classes: NDArray[np.int64] | None,
        device: torch.device,
    ) -> tuple[HalfSplit, HalfSplit]:
        """See :func:`~evalkit.metrics.halves.halves_of_density_coverage`."""
        _check(reference, samples, self.k)
        return halves_of_density_coverage(
            reference,
            samples,
            k=self.k,
            classes=classes,
            reference_classes=reference_classes,
            device=device,
        )


def _check(reference: NDArray[np.float32], samples: NDArray[np.float32], k: int) -> None:
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1, the nearest neighbour")
    check_sides(reference, samples, f"density and coverage with k = {k}", least=k + 1)
