"""Improved precision and recall: the share of samples on the reference manifold, and the other way round.

Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models". A manifold
is the union of balls around its points, each with a radius up to the point's k-th nearest neighbour.

Only comparisons of distances matter, and most are clear from a rough value. So a cheap *screen* (see
``screening``) bounds all distances from below, by products in few bits, and the few pairs that it cannot rule
out are *decided* one by one (see ``points``), in float64 or in the emulated float16 arithmetic of the
reference evaluator (see ``float16``). The margins of the screens are worst-case bounds of their rounding, so
the result is the same as if every pair were decided. One product serves both of its points: only half of the
pairs within a set are computed, and the pairs between the sets once for both precision and recall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.deviations import HalfSplit
from evalkit.errors import InputError
from evalkit.metrics.base import check_sides
from evalkit.metrics.float16 import Float16, brute_force, may_overflow
from evalkit.metrics.halves import halves_of_precision_recall
from evalkit.metrics.on_rows import ByHalves
from evalkit.metrics.points import Points, exact_sides, on_device
from evalkit.metrics.screening import Screening
from evalkit.metrics.search import Covering, counted, each_stripe, radii
from evalkit.results import ScoreSpec
from evalkit.system.devices import float32_arithmetic

__all__ = ["Arithmetic", "PrecisionRecall", "precision_recall"]

Arithmetic: TypeAlias = Literal["float16", "exact"]


def precision_recall(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    *,
    k: int = 3,
    arithmetic: Arithmetic = "exact",
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 to 3).

    A ball's squared radius is entry k of its point's sorted squared distances to all points of its set
    (entry 0 is the point itself). Points on the sphere are inside.

    Args:
        reference: (n, d) float32 features.
        samples: (m, d) float32 features.
        k: The radius of a ball reaches to this nearest neighbour.
        arithmetic: ``"exact"`` compares squared distances ``|u - v|^2`` in float64. ``"float16"`` compares
            ``max(|u|^2 - 2uv + |v|^2, 0)`` as the reference evaluator rounds it: features, squares, sums,
            product and differences in float16, norms summed in the order of TensorFlow's CPU kernel,
            products accumulated in higher precision and rounded once. A block of 10,000 x 10,000 in which
            a value overflows is computed in float32 instead.
        device: torch device of the computation; mps, which has no float64, is replaced by the CPU.
        progress: Called with the rows done and the rows in total.

    Returns:
        The share of samples inside a ball of the reference, and the share of the reference inside a ball of
        the samples.

    Raises:
        UndefinedMetricError: A side has no more than k rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
        InputError: ``k`` is below 1.
    """
    _check(reference, samples, k)
    r, s = on_device(device, reference, samples)
    # TF32 or bfloat16 products would break the margins of the screens.
    with torch.inference_mode(), float32_arithmetic():
        if arithmetic == "exact":
            return _screened(*exact_sides(r, s), k, progress)
        half_r, half_s = Float16(r), Float16(s)
        if may_overflow(half_r, half_s):
            return brute_force(r, s, k)
        return _screened(half_r, half_s, k, progress)


@dataclass(frozen=True)
class PrecisionRecall(ByHalves):
    """Improved precision and recall of the samples; see :func:`precision_recall`.

    Attributes:
        output: Of which network and output.
        k: Which nearest neighbour a ball reaches to.
        arithmetic: ``"float16"`` is the reference evaluator's, ``"exact"`` is float64.
        scores: Their names.
    """

    output: str = "inception:pool"
    k: int = 3
    arithmetic: Arithmetic = "exact"
    scores: tuple[ScoreSpec, ...] = (
        ScoreSpec(name="precision", title="Precision", higher_is_better=True),
        ScoreSpec(name="recall", title="Recall", higher_is_better=True),
    )

    def values(
        self,
        reference: NDArray[np.float32],
        samples: NDArray[np.float32],
        *,
        device: str,
        progress: Callable[[int, int], object],
    ) -> tuple[float, float]:
        """See :func:`precision_recall`."""
        return precision_recall(
            reference, samples, k=self.k, arithmetic=self.arithmetic, device=device, progress=progress
        )

    def halves(
        self,
        reference: NDArray[np.float32],
        samples: NDArray[np.float32],
        *,
        classes: NDArray[np.int64] | None,
        reference_classes: NDArray[np.int64] | None,
        device: torch.device,
    ) -> tuple[HalfSplit, HalfSplit]:
        """See :func:`~evalkit.metrics.halves.halves_of_precision_recall`."""
        _check(reference, samples, self.k)
        return halves_of_precision_recall(
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
    check_sides(reference, samples, f"precision and recall with k = {k}", least=k + 1)


def _screened(
    r: Points, s: Points, k: int, progress: Callable[[int, int], object] | None
) -> tuple[float, float]:
    """Precision and recall where the deciding arithmetic does not overflow."""
    screening = Screening(r)
    advance = counted(2 * len(r.x) + len(s.x), progress)
    radii_r, radii_s = (radii(side, k, screening, advance) for side in (r, s))
    covering = Covering(r, radii_r, s, radii_s, screening)
    inside = covering.none()
    for found in each_stripe(r, screening, covering.look, advance):
        inside |= found
    return float(inside[: len(s.x)].double().mean()), float(inside[len(s.x) :].double().mean())
