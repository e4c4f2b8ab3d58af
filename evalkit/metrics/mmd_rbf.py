"""The distance of CMMD: how far apart two sets of embeddings are, in a Gaussian kernel.

Jayasumana et al. 2024, "Rethinking FID: Towards a Better Evaluation Metric for Image Generation". CMMD itself
is this distance on image embeddings of CLIP ViT-L/14 at 336 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.deviations import Excess
from evalkit.errors import InputError
from evalkit.metrics.base import check_directions, check_sides
from evalkit.metrics.kernel import KernelMeans, kernel_means
from evalkit.metrics.on_rows import Computed, ComputedOnce
from evalkit.results import ScoreSpec
from evalkit.system.run import Run

__all__ = ["GaussianOfDirections", "RBFDistance", "rbf_mmd"]

SCALE = 1000.0
"""Published numbers are a thousand times the distance."""


@dataclass(frozen=True)
class GaussianOfDirections:
    """``exp(-|a - b|^2 / (2 sigma^2))`` of features that are brought to length 1."""

    sigma: float

    def __call__(self, a: Tensor, b: Tensor, /) -> Tensor:
        """See :class:`~evalkit.metrics.kernel.Kernel`."""
        a, b = (torch.nn.functional.normalize(each, eps=0) for each in (a, b))
        return (a @ b.T).sub_(1).div_(self.sigma**2).exp_()

    def diagonal(self, a: Tensor, /) -> Tensor:
        """See :class:`~evalkit.metrics.kernel.Kernel`."""
        return torch.ones(len(a), dtype=a.dtype, device=a.device)


def rbf_mmd(
    reference: NDArray[np.floating],
    samples: NDArray[np.floating],
    *,
    sigma: float = 10.0,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> KernelMeans:
    """A thousand times the squared maximum mean discrepancy (Jayasumana et al. 2024, section 4), in float64.

    ``mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)``, with pairs of an image with itself, as in
    the authors' code. These make it too large, by ``(1 - mean k(x, x')) / m + (1 - mean k(y, y')) / n`` of
    different images: the bias. Features are brought to length 1 first.

    Args:
        reference: (m, d) float features.
        samples: (n, d) float features.
        sigma: Width of the kernel.
        device: torch device with float64; ``mps`` is replaced by the CPU.
        progress: Called with the rows done and the rows in total.

    Raises:
        UndefinedMetricError: A side has fewer than two rows, or a row is zero.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
        InputError: ``sigma`` is not positive.
    """
    if not sigma > 0:
        raise InputError(f"sigma is {sigma}; expected a positive number, such as 10")
    check_sides(reference, samples, "a kernel distance")
    for name, rows in (("reference", reference), ("samples", samples)):
        check_directions(rows, name)
    kernel = GaussianOfDirections(sigma)
    found = kernel_means(reference, samples, kernel=kernel, biased=True, device=device, progress=progress)
    return KernelMeans(
        value=SCALE * found.value,
        reference=SCALE * found.reference,
        samples=SCALE * found.samples,
        excess=Excess(*(SCALE**2 * each for each in found.excess)),
        bias=SCALE * found.bias,
    )


@dataclass(frozen=True)
class RBFDistance(ComputedOnce):
    """CMMD's distance of the samples to the reference, on any network; see :func:`rbf_mmd`. Lower is better.

    Attributes:
        output: Of which network and output.
        sigma: Width of the kernel, for features of length 1.
        scores: Its name.
    """

    output: str = "inception:pool"
    sigma: float = 10.0
    scores: tuple[ScoreSpec, ...] = (ScoreSpec(name="mmd_rbf", title="MMD (RBF)", higher_is_better=False),)

    def compute(self, reference: NDArray[np.float32], samples: NDArray[np.float32], run: Run) -> Computed:
        """See :func:`rbf_mmd` and :meth:`~evalkit.metrics.kernel.KernelMeans.influence`."""
        found = rbf_mmd(reference, samples, sigma=self.sigma, device=run.device, progress=self.report(run))
        return Computed(found.value, found.influence())
