"""Kernel distances: how far apart two sets of features are, in the mean embedding of a kernel.

Bińkowski et al. 2018, "Demystifying MMD GANs", section 4: the Kernel Inception Distance (KID).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.features.moments import check_rows
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import Need, parameters
from evalkit.results import Score, ScoreSpec
from evalkit.system.run import Run

__all__ = ["KernelDistance", "polynomial_mmd"]

# Rows of a block of the kernel matrix: 128 MiB at 8 bytes.
_BLOCK = 4096


def polynomial_mmd(
    reference: NDArray[np.floating],
    samples: NDArray[np.floating],
    *,
    degree: int = 3,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> float:
    """Squared maximum mean discrepancy, unbiased, of all samples (Bińkowski et al. 2018, equation 4).

    ``sum_{i!=j} k(x_i, x_j) / (m (m - 1)) + sum_{i!=j} k(y_i, y_j) / (n (n - 1)) - 2 mean k(x_i, y_j)`` with
    ``k(x, y) = (x.y / d + 1) ** degree``, in float64. No subsets are drawn: this is the estimate of least
    variance. It may be negative where the sets are alike.

    Args:
        reference: (m, d) float features.
        samples: (n, d) float features.
        degree: Of the polynomial.
        device: torch device with float64; ``mps`` is replaced by the CPU.
        progress: Called with the rows done and the rows in total.

    Raises:
        UndefinedMetricError: A side has fewer than two rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
    """
    for name, rows in (("reference", reference), ("samples", samples)):
        check_rows(rows, name)
        if len(rows) < 2:
            raise UndefinedMetricError(
                f"a kernel distance of {len(rows)} image ({name}) is undefined; give at least two"
            )
    if reference.shape[1] != samples.shape[1]:
        raise FeatureError(
            f"features of {reference.shape[1]} and of {samples.shape[1]} dimensions cannot be compared; "
            "use the same output of the same network for both"
        )
    target = torch.device("cpu" if device.startswith("mps") else device)
    x, y = (torch.from_numpy(np.ascontiguousarray(rows)).to(target) for rows in (reference, samples))
    done, total = 0, 2 * len(x) + len(y)

    def mean(a: Tensor, b: Tensor, *, without_diagonal: bool = False) -> float:
        nonlocal done
        added = 0.0
        for first in range(0, len(a), _BLOCK):
            block = a[first : first + _BLOCK].double()
            for start in range(0, len(b), _BLOCK):
                added += float(_kernel(block, b[start : start + _BLOCK].double(), degree).sum())
            if without_diagonal:
                added -= float(_kernel_of_itself(block, degree).sum())
            done += len(block)
            if progress is not None:
                progress(done, total)
        return added / (len(a) * (len(b) - without_diagonal))

    with torch.inference_mode():
        within = mean(x, x, without_diagonal=True) + mean(y, y, without_diagonal=True)
        return within - 2 * mean(x, y)


def _kernel(a: Tensor, b: Tensor, degree: int) -> Tensor:
    """(n, m) ``(a.b / d + 1) ** degree``."""
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(degree)


def _kernel_of_itself(a: Tensor, degree: int) -> Tensor:
    """(n,) the diagonal of the kernel matrix of ``a``."""
    return a.square().sum(dim=1).div_(a.shape[1]).add_(1).pow_(degree)


@dataclass(frozen=True)
class KernelDistance:
    """KID of the samples to the reference; see :func:`polynomial_mmd`. Lower is better.

    Attributes:
        output: Of which network and output.
        degree: Of the polynomial kernel.
        scores: Its name.
    """

    uses_reference: ClassVar[bool] = True

    output: str = "inception:pool"
    degree: int = 3
    scores: tuple[ScoreSpec, ...] = (ScoreSpec(name="kid", title="KID", higher_is_better=False, decimals=6),)

    @property
    def needs(self) -> Mapping[str, Need]:
        """Rows of the output."""
        return {self.output: "rows"}

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """One score.

        Raises:
            UndefinedMetricError: A side has no such features, or fewer than two images.
            FeatureError: The sides do not fit together.
        """
        name = self.scores[0].name
        value = polynomial_mmd(
            reference.rows(self.output),
            samples.rows(self.output),
            degree=self.degree,
            device=run.device,
            progress=run.report(name),
        )
        return (Score(name=name, value=value, parameters=parameters(self)),)
