"""KID as a mean over random subsets: the convention of torch-fidelity, whose numbers papers print.

It has more variance than the estimate of all images in :mod:`evalkit.metrics.kernel`, and depends on the
order of the images, because subsets are drawn by index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evalkit.deviations import Excess, Influence
from evalkit.errors import InputError
from evalkit.metrics.base import check_sides
from evalkit.metrics.kernel import Polynomial, kernel_means
from evalkit.metrics.on_rows import Computed, ComputedOnce
from evalkit.results import ScoreSpec
from evalkit.system.run import Run

__all__ = ["SubsetKernelDistance", "SubsetKernelMeans", "subset_kernel_means"]


class SubsetKernelMeans(NamedTuple):
    """Kernel distances of random subsets.

    Attributes:
        values: (subsets,) the unbiased kernel distance of each.
        influence: Influence values of their mean.
    """

    values: NDArray[np.float64]
    influence: Influence


def subset_kernel_means(
    reference: NDArray[np.floating],
    samples: NDArray[np.floating],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    degree: int = 3,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> SubsetKernelMeans:
    """Kernel distances of subsets (Bińkowski et al. 2018, section 4), drawn as torch-fidelity draws them.

    For each subset, ``RandomState(seed)`` chooses images without replacement, first of the samples and then
    of the reference.

    The mean over subsets is the unbiased estimate of all images with weights: an image counts as often as it
    was drawn. So ``psi_i = n / (subsets * size) * sum of psi_i in the subsets with image i``. Its excess (see
    :class:`~evalkit.deviations.Excess`) is that of one subset times ``1/S + (1 - 1/S) size^2 / n^2``, because
    two subsets share that part of their pairs on average.

    Args:
        reference: (m, d) float features.
        samples: (n, d) float features.
        subsets: How many are drawn.
        subset_size: Images of each side in a subset; fewer where a side has fewer.
        seed: Of the draw.
        degree: Of the polynomial kernel.
        device: torch device with float64; ``mps`` is replaced by the CPU.
        progress: Called with the subsets done and their number.

    Raises:
        UndefinedMetricError: A side has fewer than two rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
        InputError: There are no subsets, or they have fewer than two images.
    """
    if subsets < 1 or subset_size < 2:
        raise InputError(
            f"{subsets} subsets of {subset_size} images; expected at least 1 of at least 2, "
            "such as 100 of 1,000"
        )
    check_sides(reference, samples, "a kernel distance")
    m, n = len(reference), len(samples)
    size = min(subset_size, m, n)
    random = np.random.RandomState(seed)
    values = np.empty(subsets)
    of_reference, of_samples = np.zeros(m), np.zeros(n)
    excess = np.zeros(len(Excess()))
    for index in range(subsets):
        chosen = random.choice(n, size, replace=False)
        chosen_reference = random.choice(m, size, replace=False)
        found = kernel_means(
            reference[chosen_reference], samples[chosen], kernel=Polynomial(degree), device=device
        )
        values[index] = found.value
        influence = found.influence()
        assert influence.reference is not None
        of_samples[chosen] += influence.samples * (n / (subsets * size))
        of_reference[chosen_reference] += influence.reference * (m / (subsets * size))
        excess += np.array(found.excess) / subsets
        if progress is not None:
            progress(index + 1, subsets)
    shared = np.array([size / n * size / n, size / m * size / m, size / n * size / m])
    excess *= 1 / subsets + (1 - 1 / subsets) * shared
    return SubsetKernelMeans(
        values,
        Influence(
            images=n,
            samples=of_samples - of_samples.mean(),
            reference=of_reference - of_reference.mean(),
            bias=0.0,
            excess=Excess(*excess.tolist()),
        ),
    )


@dataclass(frozen=True)
class SubsetKernelDistance(ComputedOnce):
    """KID as a mean over subsets; see :func:`subset_kernel_means`. Lower is better.

    Attributes:
        output: Of which network and output.
        subsets: How many subsets are drawn.
        subset_size: Images of each side in a subset; fewer where a side has fewer.
        seed: Of the draw.
        degree: Of the polynomial kernel.
        scores: Its name.
    """

    output: str = "inception:pool"
    subsets: int = 100
    subset_size: int = 1000
    seed: int = 2020
    degree: int = 3
    scores: tuple[ScoreSpec, ...] = (
        ScoreSpec(name="kid_subsets", title="KID (subsets)", higher_is_better=False, decimals=6),
    )

    def compute(self, reference: NDArray[np.float32], samples: NDArray[np.float32], run: Run) -> Computed:
        """See :func:`subset_kernel_means`. The standard deviation over subsets is not the standard error."""
        values, influence = subset_kernel_means(
            reference,
            samples,
            subsets=self.subsets,
            subset_size=self.subset_size,
            seed=self.seed,
            degree=self.degree,
            device=run.device,
            progress=self.report(run),
        )
        size = min(self.subset_size, len(reference), len(samples))
        return Computed(float(values.mean()), influence, float(values.std()), {"subset_size": size})
