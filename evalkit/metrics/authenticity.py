"""AuthPct: which samples are copies of the images that a model was trained on; and the closest pairs.

Alaa et al. 2022, "How Faithful is your Synthetic Data? Sample-level Metrics for Evaluating and Auditing
Generative Models", section 5. The reference has to be the training images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.deviations import HalfSplit
from evalkit.metrics.base import check_sides
from evalkit.metrics.halves import halves_of_authenticity
from evalkit.metrics.on_rows import ByHalves
from evalkit.metrics.points import Exact, exact_sides, on_device
from evalkit.metrics.screening import Screening
from evalkit.metrics.search import Nearest, counted, each_stripe, radii
from evalkit.results import ClosePair, ScoreSpec
from evalkit.system.devices import float32_arithmetic

__all__ = ["AuthPct", "authenticity", "closest_pairs"]


def authenticity(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    *,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> float:
    """AuthPct: the percentage of samples that are no copies of training images.

    A sample is a copy if its nearest training image has no other training image that is nearer to it than the
    sample is (Alaa et al. 2022, section 5). Of training images that are equally near, the first counts.
    Squared distances are compared in float64, and memory does not grow with the number of pairs. Of good
    samples that are no copies, about half have another training image nearer by; so this number is to be
    compared with that of another set, such as of test images.

    Args:
        reference: (m, d) float32 features of the training images.
        samples: (n, d) float32 features.
        device: torch device of the computation; mps, which has no float64, is replaced by the CPU.
        progress: Called with the rows done and the rows in total.

    Returns:
        0 to 100.

    Raises:
        UndefinedMetricError: A side has fewer than two rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
    """
    check_sides(reference, samples, "AuthPct")
    # TF32 or bfloat16 products would break the margins of the screens.
    with torch.inference_mode(), float32_arithmetic():
        r, s = exact_sides(*on_device(device, reference, samples))
        screening = Screening(r)
        advance = counted(len(r.x) + len(s.x), progress)
        to_another = radii(r, 1, screening, advance)
        authentic = 0
        for nearest, distance in each_stripe(s, screening, Nearest(s, r, screening).look, advance):
            authentic += int((to_another[nearest] < distance).sum())
        return 100 * authentic / len(s.x)


def closest_pairs(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    count: int,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> tuple[ClosePair, ...]:
    """The samples that are nearest to an image of the reference, each with that image, the nearest first.

    Of images of the reference that are equally near, the first counts, and of equally near samples the first
    comes first. The search is exact, and memory does not grow with the number of pairs.

    Args:
        reference: (m, d) float32 features.
        samples: (n, d) float32 features.
        count: How many pairs; fewer if there are fewer samples.
        device: torch device of the computation; mps, which has no float64, is replaced by the CPU.
        progress: Called with the rows done and the rows in total.

    Raises:
        UndefinedMetricError: A side has fewer than two rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
    """
    check_sides(reference, samples, "the distance to the nearest image")
    # TF32 or bfloat16 products would break the margins of the screens.
    with torch.inference_mode(), float32_arithmetic():
        r, s = exact_sides(*on_device(device, reference, samples))
        screening = Screening(r)
        count = min(count, len(s.x))
        advance = counted(len(s.x) + count, progress)
        found = [*each_stripe(s, screening, Nearest(s, r, screening).look, advance)]
        nearest, distances = (torch.cat(parts) for parts in zip(*found, strict=True))
        closest = distances.sort(stable=True).indices[:count]
        own = nearest[closest]
        chosen = Exact(r.x[own])
        look = Nearest(chosen, r, screening, own).look
        others = torch.cat([index for index, _ in each_stripe(chosen, screening, look, advance)])

    def distance(i: int, side: NDArray[np.float32], j: int) -> float:
        """In the units of the features, which the search may have scaled."""
        return float(np.linalg.norm(side[i].astype(np.float64) - reference[j]))

    return tuple(
        ClosePair(
            sample=i, reference=j, distance=distance(i, samples, j), to_another=distance(k, reference, j)
        )
        for i, j, k in zip(closest.tolist(), own.tolist(), others.tolist(), strict=True)
    )


@dataclass(frozen=True)
class AuthPct(ByHalves):
    """AuthPct of the samples; see :func:`authenticity`. Higher is better.

    Attributes:
        output: Of which network and output.
        scores: Its name.
    """

    finds_copies: ClassVar[bool] = True

    output: str = "inception:pool"
    scores: tuple[ScoreSpec, ...] = (
        ScoreSpec(name="authpct", title="AuthPct", higher_is_better=True, decimals=2),
    )

    def values(
        self,
        reference: NDArray[np.float32],
        samples: NDArray[np.float32],
        *,
        device: str,
        progress: Callable[[int, int], object],
    ) -> tuple[float]:
        """See :func:`authenticity`."""
        return (authenticity(reference, samples, device=device, progress=progress),)

    def halves(
        self,
        reference: NDArray[np.float32],
        samples: NDArray[np.float32],
        *,
        classes: NDArray[np.int64] | None,
        reference_classes: NDArray[np.int64] | None,
        device: torch.device,
    ) -> tuple[HalfSplit]:
        """See :func:`~evalkit.metrics.halves.halves_of_authenticity`."""
        check_sides(reference, samples, "AuthPct")
        return (
            halves_of_authenticity(
                reference,
                samples,
                classes=classes,
                reference_classes=reference_classes,
                device=device,
            ),
        )
