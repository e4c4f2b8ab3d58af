"""Kernel distances: how far apart two sets of features are, in the mean embedding of a kernel.

Bińkowski et al. 2018, "Demystifying MMD GANs", section 4: the Kernel Inception Distance (KID).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.deviations import Excess, Influence
from evalkit.metrics.base import check_sides
from evalkit.metrics.on_rows import Computed, ComputedOnce
from evalkit.results import ScoreSpec
from evalkit.system.devices import float64_device
from evalkit.system.run import Run

__all__ = ["Kernel", "KernelDistance", "KernelMeans", "Polynomial", "kernel_means", "polynomial_mmd"]

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
    kernel = Polynomial(degree)
    return kernel_means(reference, samples, kernel=kernel, device=device, progress=progress).value


class Kernel(Protocol):
    """How alike two images are."""

    def __call__(self, a: Tensor, b: Tensor, /) -> Tensor:
        """(n, m) of each row of ``a``, (n, d) float64, with each of ``b``, (m, d)."""

    def diagonal(self, a: Tensor, /) -> Tensor:
        """(n,) of each row with itself."""


@dataclass(frozen=True)
class Polynomial:
    """``(a.b / d + 1) ** degree``."""

    degree: int = 3

    def __call__(self, a: Tensor, b: Tensor, /) -> Tensor:
        """See :class:`Kernel`."""
        return (a @ b.T).div_(a.shape[1]).add_(1).pow_(self.degree)

    def diagonal(self, a: Tensor, /) -> Tensor:
        """See :class:`Kernel`."""
        return a.square().sum(dim=1).div_(a.shape[1]).add_(1).pow_(self.degree)


_CUBIC = Polynomial()


class KernelMeans(NamedTuple):
    """A kernel distance, with the means of the kernel that its influence values follow from.

    Attributes:
        value: As :func:`polynomial_mmd`.
        reference: (m,) mean kernel of each image of the reference with the others, minus that with the
            samples.
        samples: (n,) likewise.
        excess: What the influence values count too much.
        bias: What the value exceeds the unbiased one by.
    """

    value: float
    reference: NDArray[np.float64]
    samples: NDArray[np.float64]
    excess: Excess
    bias: float = 0.0

    def influence(self) -> Influence:
        """``psi_j = 2 (mean_{i != j} k(y_j, y_i) - mean_i k(y_j, x_i))``, centred.

        The projection of the U-statistic: Hoeffding 1948, "A Class of Statistics with Asymptotically Normal
        Distribution"; for kernel distances Bounliphone et al. 2016, arXiv:1511.04581. Of the biased distance,
        i = j counts as well.
        """
        return Influence(
            images=len(self.samples),
            samples=2 * (self.samples - self.samples.mean()),
            reference=2 * (self.reference - self.reference.mean()),
            bias=self.bias,
            excess=self.excess,
        )


def kernel_means(
    reference: NDArray[np.floating],
    samples: NDArray[np.floating],
    *,
    kernel: Kernel = _CUBIC,
    biased: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> KernelMeans:
    """A kernel distance with the means over rows; errors are those of :func:`polynomial_mmd`.

    Args:
        reference: (m, d) float features.
        samples: (n, d) float features.
        kernel: Any kernel.
        biased: Pairs of an image with itself count, too (the V-statistic).
        device: torch device with float64; ``mps`` is replaced by the CPU.
        progress: Called with the rows done and the rows in total.
    """
    check_sides(reference, samples, "a kernel distance")
    target = float64_device(device)
    x, y = (torch.from_numpy(np.ascontiguousarray(rows)).to(target) for rows in (reference, samples))
    done, total = 0, 2 * len(x) + len(y)

    def mean(a: Tensor, b: Tensor, *, without_diagonal: bool = False) -> _Means:
        nonlocal done
        added = squares = 0.0
        rows, columns = (torch.zeros(len(each), dtype=torch.float64, device=target) for each in (a, b))
        for first in range(0, len(a), _BLOCK):
            block = a[first : first + _BLOCK].double()
            for start in range(0, len(b), _BLOCK):
                found = kernel(block, b[start : start + _BLOCK].double())
                added += float(found.sum())
                squares += float(found.flatten().dot(found.flatten()))
                rows[first : first + _BLOCK] += found.sum(dim=1)
                columns[start : start + _BLOCK] += found.sum(dim=0)
            if without_diagonal:
                diagonal = kernel.diagonal(block)
                added -= float(diagonal.sum())
                squares -= float(diagonal.square().sum())
                rows[first : first + _BLOCK] -= diagonal
            done += len(block)
            if progress is not None:
                progress(done, total)
        if without_diagonal:
            columns = rows
        others = len(b) - without_diagonal
        pairs = len(a) * others
        return _Means(added / pairs, rows / others, columns / (pairs / len(b)), squares / pairs)

    with torch.inference_mode():
        in_x, in_y = (mean(each, each, without_diagonal=True) for each in (x, y))
        across = mean(x, y)
        m, n = len(x), len(y)
        excess = Excess(2 * in_y.variance / n**2, 2 * in_x.variance / m**2, 4 * across.variance / (n * m))
        bias = 0.0
        if biased:
            for side, within in ((x, in_x), (y, in_y)):
                own = torch.cat([kernel.diagonal(block.double()) for block in torch.split(side, _BLOCK)])
                bias += (float(own.mean()) - within.all) / len(side)
                within.rows.add_((own - within.rows) / len(side))
        return KernelMeans(
            value=in_x.all + in_y.all - 2 * across.all + bias,
            reference=(in_x.rows - across.rows).cpu().numpy(),
            samples=(in_y.rows - across.columns).cpu().numpy(),
            excess=excess,
            bias=bias,
        )


class _Means(NamedTuple):
    """Means of the kernel over the pairs of two sets: of all, by row, by column, and of its square."""

    all: float
    rows: Tensor
    columns: Tensor
    square: float

    @property
    def variance(self) -> float:
        """Mean square of the kernel without its means by row and by column."""
        by_rows, by_columns = (float(each.square().mean()) for each in (self.rows, self.columns))
        return self.square - by_rows - by_columns + self.all**2


@dataclass(frozen=True)
class KernelDistance(ComputedOnce):
    """KID of the samples to the reference; see :func:`polynomial_mmd`. Lower is better.

    Attributes:
        output: Of which network and output.
        degree: Of the polynomial kernel.
        scores: Its name.
    """

    output: str = "inception:pool"
    degree: int = 3
    scores: tuple[ScoreSpec, ...] = (ScoreSpec(name="kid", title="KID", higher_is_better=False, decimals=6),)

    def compute(self, reference: NDArray[np.float32], samples: NDArray[np.float32], run: Run) -> Computed:
        """See :func:`polynomial_mmd` and :meth:`KernelMeans.influence`."""
        kernel = Polynomial(self.degree)
        found = kernel_means(reference, samples, kernel=kernel, device=run.device, progress=self.report(run))
        return Computed(found.value, found.influence())
