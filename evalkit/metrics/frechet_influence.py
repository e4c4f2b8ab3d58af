"""Influence values and finite-sample bias of the Fréchet distance, in closed form.

With reference (m, S), samples (mu, Sigma), ``S = L L^T`` and ``L^T Sigma L = V diag(lambda) V^T``, the
distance is ``F = |mu - m|^2 + tr Sigma + tr S - 2 sum(s)``, ``s = sqrt(lambda)``. Its first derivatives in
the weights of images are the influence values, the mean of the second-order term is the bias. Rippl, Munk and
Sturm 2015, "Limit laws of the empirical Wasserstein distance: Gaussian distributions", arXiv:1507.04090, give
the derivatives of F. Chong and Forsyth 2019, arXiv:1911.07023, show that the bias falls with 1/n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor

from evalkit.deviations import Excess, Influence
from evalkit.errors import UndefinedMetricError
from evalkit.features.moments import Floats, Moments
from evalkit.system.devices import accelerator, float32_arithmetic

__all__ = ["Cloud", "Transport", "frechet_influence", "needs_halves"]

Doubles = NDArray[np.float64]

_ROWS = 2048
"""Rows of features in a block of a product: 32 MiB at 2048 features in float64."""

_MANY = 20
"""With so many images for each feature, the bias formula needs no correction by halves."""


def needs_halves(n: int, dimensions: int) -> bool:
    """Whether there are so few rows that the bias formula leaves something over."""
    return n < _MANY * dimensions


_CAUCHY_TOLERANCE = 1e-15

_PAIRED_ROWS = 256
"""Rows of each side, of whose pairs the mean square of the second order is computed."""


@dataclass(frozen=True, eq=False)
class Cloud:
    """The features of one side with their mean and covariance.

    Attributes:
        mean: (d,) float64.
        covariance: (d, d) float64, of which the diagonal and the upper triangle count.
        rows: (n, d) float32 or float64; None where only the statistics are known.
    """

    mean: Doubles
    covariance: Doubles
    rows: Floats | None

    @classmethod
    def of(cls, rows: Floats, device: torch.device | None = None) -> Cloud:
        """From (n, d) rows; device as for :class:`~evalkit.features.moments.Moments`."""
        moments = Moments.of(rows, device)
        return cls(moments.mean, moments.upper_covariance(), rows)

    @property
    def n(self) -> int | None:
        """Number of rows; None where they are not known."""
        return None if self.rows is None else len(self.rows)

    def is_small(self) -> bool:
        """Whether there are so few rows that the bias formula leaves something over."""
        return self.rows is not None and needs_halves(*self.rows.shape)

    def halves(self, device: torch.device | None = None) -> tuple[Cloud, Cloud]:
        """Two random halves, always the same ones; twice the whole, where it is not small."""
        if self.rows is None or not self.is_small():
            return self, self
        order = np.random.default_rng(0).permutation(len(self.rows))
        first, second = np.array_split(order, 2)
        return Cloud.of(self.rows[first], device), Cloud.of(self.rows[second], device)


class Transport:
    """The optimal map between the Gaussians of two sides, by one eigenproblem that serves both directions.

    Attributes:
        distance: F.

    Raises:
        UndefinedMetricError: A covariance is singular.
    """

    def __init__(self, reference: Cloud, samples: Cloud) -> None:
        self._reference, self._samples = reference, samples
        upper = reference.covariance
        try:
            # Columns v = L^-T V, so that v^T S v = 1.
            values, v = linalg.eigh(
                samples.covariance, upper, lower=False, type=2, driver="gvd", check_finite=False
            )
        except linalg.LinAlgError:  # S has no Cholesky factor
            values = np.zeros(1)
        if values[0] <= np.finfo(np.float64).eps * values[-1]:
            raise UndefinedMetricError(
                "a covariance is singular: some combination of features is the same for all images of a "
                "side; give more images"
            )
        self._s = s = np.sqrt(values)
        self._cauchy = _factor(s[:, None] * s / (s[:, None] + s))
        # Rows times these columns have variance 1: L V / s for the samples, L^-T V for the reference.
        self._to_samples = linalg.blas.dsymm(1.0, upper, v) / s
        self._to_reference = v
        shift = samples.mean - reference.mean
        traces = np.trace(samples.covariance) + np.trace(upper)
        self.distance = float(shift @ shift + traces - 2 * s.sum())

    def of_samples(self, device: torch.device) -> tuple[Doubles, float]:
        """(n,) influence values of the samples, and the bias that they cause."""
        return self._of(self._samples, self._reference.mean, self._to_samples, device)

    def of_reference(self, device: torch.device) -> tuple[Doubles, float]:
        """(m,) the same of the reference's images: the roles are exchanged."""
        return self._of(self._reference, self._samples.mean, self._to_reference, device)

    def _of(
        self, cloud: Cloud, other_mean: Doubles, basis: Doubles, device: torch.device
    ) -> tuple[Doubles, float]:
        """``psi_i = 2 (x_i - mu).(mu - m) + |x_i - mu|^2 - sum_j Y_ij^2 / s_j``, and the bias b.

        ``b = tr(Sigma) / n + (mean_i sum_jk Z_ij Z_ik C_jk - sum(s) / 2) / (2 n)`` with
        ``Z_ij = Y_ij^2 / lambda_j`` and ``C_jk = s_j s_k / (s_j + s_k)``. C is a Cauchy matrix: it has a
        factor of few columns, so that no product of (n, d) with (n, d) is needed.
        """
        rows = cloud.rows
        assert rows is not None
        n = len(rows)
        weights = np.column_stack([self._s, self._cauchy])
        quadratic = np.empty(n)
        curved = 0.0
        # Products are of the rows' own precision; the values are sums over thousands of features.
        dtype = torch.float64 if rows.dtype == np.float64 else torch.float32
        shift = torch.from_numpy(cloud.mean - other_mean).to(device)
        columns, weight = (torch.from_numpy(each).to(device, dtype) for each in (basis, weights))
        linear = np.empty(n)
        with torch.inference_mode(), float32_arithmetic():
            for start in range(0, n, _ROWS):
                block = slice(start, start + _ROWS)
                x = torch.from_numpy(rows[block] - cloud.mean).to(device)
                z = (x.to(dtype) @ columns).square_() @ weight
                quadratic[block] = (x.square().sum(dim=1) - z[:, 0].double()).cpu().numpy()
                linear[block] = (x @ shift).cpu().numpy()
                curved += float(z[:, 1:].double().square().sum())
        # The covariance has the divisor n - 1.
        psi = 2 * linear + quadratic * (n / (n - 1))
        bias = (np.trace(cloud.covariance) + (curved / n - self._s.sum() / 2) / 2) / n
        return psi - psi.mean(), float(bias)

    def excess(self, device: torch.device) -> Excess:
        """What the influence values count too much, from second derivatives of random pairs of images."""
        rng = np.random.default_rng(0)
        s, g = (torch.from_numpy(each).to(device) for each in (self._s, self._cauchy))
        sampled = _Drawn.of(self._samples, self._to_samples, rng, device)
        n = sampled.n
        among_samples = sampled.mean_square(sampled, s, g) / (2 * n**2)
        if self._reference.rows is None:
            return Excess(among_samples)
        drawn = _Drawn.of(self._reference, self._to_reference, rng, device)
        m = drawn.n
        return Excess(
            among_samples,
            drawn.mean_square(drawn, s, g) / (2 * m**2),
            drawn.mean_square(sampled, s, g) / (n * m),
        )


class _Drawn(NamedTuple):
    """Some rows of a side, drawn at random.

    Attributes:
        n: Number of rows of the side.
        x: (count, d) float64 deviations from the mean.
        u: (count, d) float64 the same in coordinates of variance 1.
    """

    n: int
    x: Tensor
    u: Tensor

    @classmethod
    def of(cls, cloud: Cloud, basis: Doubles, rng: np.random.Generator, device: torch.device) -> _Drawn:
        """Of a side."""
        assert cloud.rows is not None
        n = len(cloud.rows)
        x = torch.from_numpy(cloud.rows[rng.permutation(n)[:_PAIRED_ROWS]] - cloud.mean).to(device)
        return cls(n, x, x @ torch.from_numpy(basis).to(device))

    def mean_square(self, other: _Drawn, s: Tensor, g: Tensor) -> float:
        """Of the second derivative of F in the weights of two images, over pairs of them.

        Two of one side have ``2 sum_j s_j u_j v_j + Q``, one of each ``-(2 x.y + Q)``, with
        ``Q = sum_jk (u_j u_k - delta_jk) (v_j v_k - delta_jk) C_jk`` and ``C = G G^T``. Moving the mean also
        moves the covariance, which is why the two differ.
        """
        u, v = self.u, other.u
        linear = (u * s) @ v.T if other is self else self.x @ other.x.T
        kappa = 2 * linear - (u.square() @ s)[:, None] / 2 - v.square() @ s / 2 + s.sum() / 2
        for column in g.T:
            kappa += ((u * column) @ v.T).square_()
        squares = kappa.square_()
        if other is self:
            count = len(u)
            return float(squares.sum() - squares.diagonal().sum()) / (count * (count - 1))
        return float(squares.mean())


def _factor(matrix: Doubles) -> Doubles:
    """(d, r) G with ``G G^T`` the matrix to rounding, r as small as can be: Cholesky's factor with pivots."""
    tolerance = _CAUCHY_TOLERANCE * np.diagonal(matrix).max()
    lower, pivots, rank, _ = linalg.lapack.dpstrf(matrix, tol=tolerance, lower=1)
    factor: Doubles = np.empty((len(matrix), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


def frechet_influence(
    reference: Cloud, samples: Cloud, *, no_reference: str = "", device: torch.device | None = None
) -> Influence:
    """Influence values of the Fréchet distance, and its bias.

    Args:
        reference: Of any kind; only where it has rows, they have influence values and a bias.
        samples: With rows.
        no_reference: Why the reference has no rows, for the user.
        device: torch device of the products.

    Returns:
        The influence values. The bias is that of both sides, of the samples alone where the reference has no
        rows. With fewer than 20 images for each feature, halves of the small sides take away what the formula
        leaves over: ``[4 F~_n - mean F~_(n/2)] / 3``.

    Raises:
        UndefinedMetricError: The samples have no rows, a side has no more rows than features, or a covariance
            is singular.
    """
    device = device or torch.device("cpu")
    if samples.rows is None:
        raise UndefinedMetricError("only the statistics of the samples are known; give their images")
    for name, side in (("reference", reference), ("samples", samples)):
        if side.n is not None and side.n <= side.mean.size:
            raise UndefinedMetricError(
                f"{side.n:,} images ({name}) of {side.mean.size:,} features have a singular covariance; "
                "give more images than features"
            )
    transport = Transport(reference, samples)
    psi, bias = transport.of_samples(device)
    psi_reference = None
    if reference.rows is not None:
        psi_reference, of_reference = transport.of_reference(device)
        bias += of_reference
    found, why = _corrected(reference, samples, bias, transport.distance, device)
    return Influence(
        images=len(samples.rows),
        samples=psi,
        reference=psi_reference,
        no_reference=no_reference if psi_reference is None else "",
        bias=found,
        no_bias=why,
        excess=transport.excess(device),
    )


def _corrected(
    reference: Cloud, samples: Cloud, bias: float, distance: float, device: torch.device
) -> tuple[float | None, str]:
    """The bias with what halves say of its next order; or why there is none."""
    small = [side for side in (reference, samples) if side.is_small()]
    if not small:
        return bias, ""
    d = samples.mean.size
    fewest = min(side.n or 0 for side in small)
    if fewest // 2 <= d:
        return None, f"{fewest:,} images of {d:,} features are too few; give at least {2 * (d + 1):,}"
    gpu = accelerator(str(device))
    try:
        of_halves = [
            _unbiased(*halves, device)
            for halves in zip(reference.halves(gpu), samples.halves(gpu), strict=True)
        ]
    except UndefinedMetricError as error:
        return None, f"half of the images is too few: {error}"
    corrected = (4 * (distance - bias) - float(np.mean(of_halves))) / 3
    return distance - corrected, ""


def _unbiased(reference: Cloud, samples: Cloud, device: torch.device) -> float:
    """F~ = F - b, without correction."""
    transport = Transport(reference, samples)
    bias = transport.of_samples(device)[1]
    if reference.rows is not None:
        bias += transport.of_reference(device)[1]
    return transport.distance - bias
