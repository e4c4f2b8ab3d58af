"""Precision, recall, density and coverage as dgm-eval computes them, with the package prdc.

Stein et al. 2023, "Exposing flaws of generative model evaluation metrics and their unfair treatment of
diffusion models" (arXiv 2306.04675). Points on a sphere are outside, unlike in the precision and recall of
Kynkäänniemi et al. 2019, and of large sides 10,000 images are drawn. dgm-eval draws them anew in every run;
here, the lot of an image is a digest of its features, so that the same sets give the same scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.deviations import HalfSplit
from evalkit.errors import InputError
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import check_sides
from evalkit.metrics.density_coverage import DensityCoverage
from evalkit.metrics.halves import halves_of_precision_recall
from evalkit.metrics.kept import Kept
from evalkit.metrics.on_rows import ByHalves
from evalkit.metrics.points import by_lot, exact_sides, on_device
from evalkit.metrics.precision_recall import PrecisionRecall
from evalkit.metrics.screening import Screening
from evalkit.metrics.search import Inside, counted, each_stripe, radii
from evalkit.results import ScoreSpec
from evalkit.system.devices import float32_arithmetic

__all__ = ["DrawnDensityCoverage", "StrictPrecisionRecall", "drawn", "strict_precision_recall"]

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


def drawn(reference: Rows, samples: Rows, images: int) -> tuple[Rows, Rows]:
    """The images of each side that dgm-eval's neighbours are searched among: equally many, by lot.

    Args:
        reference: (m, d) float32 features.
        samples: (n, d) float32 features.
        images: The most of a side. A side with no more than are drawn is returned as it is.

    Raises:
        InputError: ``images`` is below 1.
    """
    if images < 1:
        raise InputError(f"{images} images of each side; expected at least 1, such as 10,000")
    size = min(images, len(reference), len(samples))
    of_reference, of_samples = (
        side if len(side) == size else side[np.sort(by_lot(side)[:size])] for side in (reference, samples)
    )
    return of_reference, of_samples


def strict_precision_recall(
    reference: Rows,
    samples: Rows,
    *,
    k: int = 5,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> tuple[float, float]:
    """Precision and recall (Kynkäänniemi et al. 2019) with points on the sphere outside, as in prdc.

    A ball around a point reaches to its k-th nearest neighbour in its own set, itself not counted. Squared
    distances ``|u - v|^2`` are compared in float64, and memory does not grow with the number of pairs.

    Args:
        reference: (m, d) float32 features.
        samples: (n, d) float32 features.
        k: The radius of a ball reaches to this nearest neighbour.
        device: torch device of the computation; mps, which has no float64, is replaced by the CPU.
        progress: Called with the rows done and the rows in total.

    Returns:
        The share of samples inside a ball around the reference, and of the reference inside one of a sample.

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
        advance = counted(2 * (len(r.x) + len(s.x)), progress)
        shares = []
        for centres, points in ((r, s), (s, r)):
            balls = Inside(centres, radii(centres, k, screening, advance), points, screening)
            covered = torch.zeros(len(points.x), dtype=torch.bool, device=points.x.device)
            for found in each_stripe(centres, screening, balls.look, advance):
                for _, point in found:
                    covered[point] = True
            shares.append(float(covered.double().mean()))
        return shares[0], shares[1]


# Keyed by reference, samples, output and number; used by the call and by the error bars.
_DRAWN: Kept[Kept[tuple[Rows, Rows]]] = Kept()


class _OfDrawn(ByHalves):
    """A metric on the images selected by :func:`drawn`.

    Attributes:
        images: Maximum number of images from each side.
    """

    images: int

    def rows(self, reference: BatchFeatures, samples: BatchFeatures) -> tuple[Rows, Rows]:
        """The rows of the selected images; the selection is made once.

        Raises:
            UndefinedMetricError: A side has no such features.
            InputError: ``images`` is below 1.
        """

        def make() -> tuple[Rows, Rows]:
            return drawn(reference.rows(self.output), samples.rows(self.output), self.images)

        return _DRAWN.of(reference, None, Kept).of(samples, (self.output, self.images), make)


@dataclass(frozen=True)
class StrictPrecisionRecall(_OfDrawn):
    """Precision and recall as in dgm-eval; see :func:`strict_precision_recall` and :func:`drawn`.

    Attributes:
        output: Of which network and output.
        k: Which nearest neighbour a ball reaches to.
        images: The most of each side.
        scores: Their names.
    """

    output: str = "inception:pool"
    k: int = 5
    images: int = 10_000
    scores: tuple[ScoreSpec, ...] = PrecisionRecall.scores

    def values(
        self, reference: Rows, samples: Rows, *, device: str, progress: Callable[[int, int], object]
    ) -> tuple[float, float]:
        """See :func:`strict_precision_recall`."""
        return strict_precision_recall(reference, samples, k=self.k, device=device, progress=progress)

    def halves(
        self,
        reference: Rows,
        samples: Rows,
        *,
        classes: Labels | None,
        reference_classes: Labels | None,
        device: torch.device,
    ) -> tuple[HalfSplit, HalfSplit]:
        """See :func:`~evalkit.metrics.halves.halves_of_precision_recall`, where spheres are inside."""
        _check(reference, samples, self.k)
        return halves_of_precision_recall(
            reference,
            samples,
            k=self.k,
            classes=classes,
            reference_classes=reference_classes,
            device=device,
        )


@dataclass(frozen=True)
class DrawnDensityCoverage(_OfDrawn, DensityCoverage):
    """Density and coverage as in dgm-eval; see :func:`drawn`.

    Attributes:
        images: The most of each side.
    """

    images: int = 10_000


def _check(reference: Rows, samples: Rows, k: int) -> None:
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1, the nearest neighbour")
    check_sides(reference, samples, f"precision and recall with k = {k}", least=k + 1)
