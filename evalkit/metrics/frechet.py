"""Fréchet distance between two Gaussians: FID on pool features, sFID on spatial ones.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
equation 6; Nash et al. 2021, "Generating Images with Sparse Representations", for the spatial features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.metrics.base import FeatureSet, Layer, Progress, Spread, check_features, required_features
from evalkit.results import Score

__all__ = ["FrechetDistance", "Moments", "Statistics", "frechet_distance", "is_rank_deficient"]

Floats = NDArray[np.float32] | NDArray[np.float64]

# Rows of features that are copied to float64 at a time: 16 MiB at 2048 features, which caches may hold.
_ROWS = 1024

# Largest asymmetry of sigma, relative to its largest entry, that rounding can explain (float32 files).
_ASYMMETRY = 1e-5


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of the features of one batch.

    Attributes:
        mu: (d,) float32 or float64; other dtypes become float64.
        sigma: (d, d) float64, symmetric.

    Raises:
        FeatureError: Shapes disagree, a value is not finite, or sigma is not symmetric.
    """

    mu: Floats
    sigma: NDArray[np.float64]

    def __post_init__(self) -> None:
        mu, sigma = np.asarray(self.mu), np.asarray(self.sigma, np.float64)
        if mu.dtype not in (np.float32, np.float64):
            mu = mu.astype(np.float64)
        if mu.ndim != 1 or sigma.shape != (mu.size, mu.size) or not mu.size:
            raise FeatureError(
                f"statistics have mu of shape {mu.shape} and sigma of shape {sigma.shape}; "
                "expected (d,) and (d, d); compute them again from the images"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise FeatureError(
                "statistics contain NaN or infinity; expected finite numbers; "
                "compute them again from the images"
            )
        asymmetry = np.abs(sigma - sigma.T).max()
        if asymmetry > _ASYMMETRY * np.abs(sigma).max():
            raise FeatureError(
                f"sigma is not symmetric (entries differ by {asymmetry:.3g} from their mirror images); "
                "expected a covariance matrix; check which array was stored as sigma"
            )
        object.__setattr__(self, "mu", mu)
        object.__setattr__(self, "sigma", sigma)


class Moments:
    """Mean and covariance of rows that arrive in batches, in float64 and bounded memory.

    Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", equation 2.1. Workers can
    accumulate their own share and merge: the result equals one pass over all rows to rounding.
    """

    def __init__(self, dimensions: int) -> None:
        self.n = 0
        self._mean = np.zeros(dimensions)
        # Sum of outer products of the centred rows; Fortran order, upper triangle only.
        self._scatter = np.zeros((dimensions, dimensions), order="F")

    @property
    def mean(self) -> NDArray[np.float64]:
        """(d,) mean.

        Raises:
            UndefinedMetricError: No row has arrived.
        """
        if self.n < 1:
            raise UndefinedMetricError("the mean of no images is undefined; give at least one image")
        return self._mean.copy()

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(d, d) unbiased covariance (divisor n - 1), as ``np.cov(rows, rowvar=False)``.

        Raises:
            UndefinedMetricError: Fewer than two rows have arrived.
        """
        upper = self._upper_covariance()
        covariance: NDArray[np.float64] = np.triu(upper) + np.triu(upper, 1).T
        return covariance

    def _upper_covariance(self) -> NDArray[np.float64]:
        """The covariance in Fortran order, without its lower triangle."""
        if self.n < 2:
            raise UndefinedMetricError(
                f"the covariance of {self.n} images is undefined; give at least two images"
            )
        upper: NDArray[np.float64] = self._scatter / (self.n - 1)
        return upper

    def update(self, batch: Floats) -> None:
        """Add the rows of `batch`, (n, d) of any floating dtype.

        Raises:
            FeatureError: The batch has another width, or holds NaN or infinity.
        """
        if batch.ndim != 2 or batch.shape[1] != self._mean.size:
            raise FeatureError(
                f"features have shape {batch.shape}; expected (n, {self._mean.size}); "
                "do not mix features of different layers or extractors"
            )
        check_features(batch, "batch")
        for start in range(0, len(batch), _ROWS):
            block = batch[start : start + _ROWS]
            rows = np.empty((len(block) + 1, self._mean.size))
            rows[:-1] = block
            mean = rows[:-1].mean(axis=0)
            rows[:-1] -= mean
            self._add(len(block), mean, rows)

    def merge(self, other: Moments) -> None:
        """Add the rows that `other` has seen; `other` stays as it is.

        Raises:
            FeatureError: `other` has another width.
        """
        if other._mean.size != self._mean.size:
            raise FeatureError(
                f"moments of {other._mean.size} features cannot be merged into moments of {self._mean.size}; "
                "do not mix features of different layers or extractors"
            )
        if other.n:
            self._scatter += other._scatter
            self._add(other.n, other._mean, np.empty((1, self._mean.size)))

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`restore` makes an equal object."""
        return {"n": np.array(self.n), "mean": self._mean, "scatter": self._scatter}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Becomes what :meth:`state` was taken of; adding the same rows then gives the same bits."""
        self.n = int(state["n"])
        self._mean = np.array(state["mean"], np.float64)
        self._scatter = np.array(state["scatter"], np.float64, order="F")

    def _add(self, n: int, mean: NDArray[np.float64], rows: NDArray[np.float64]) -> None:
        """Add `n` rows of that mean; `rows` holds those not yet counted, centred, and a free last row."""
        total = self.n + n
        shift = mean - self._mean
        # The last row accounts for the distance of the means, so that one rank-k update does it all.
        rows[-1] = shift * np.sqrt(self.n * n / total)
        self._scatter = linalg.blas.dsyrk(1.0, rows.T, beta=1.0, c=self._scatter, overwrite_c=True)
        self._mean = self._mean + shift * (n / total)
        self.n = total


def is_rank_deficient(n: int, dimensions: int) -> bool:
    """Whether the covariance of `n` rows of `dimensions` features is singular, which biases the distance."""
    return n <= dimensions


def frechet_distance(
    a: Statistics | Floats, b: Statistics | Floats, *, mean_dtype: Literal["float32", "float64"] = "float64"
) -> float:
    """``|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 sqrtm(sigma_a sigma_b))``.

    Heusel et al. 2017, equation 6. No matrix square root is taken: with ``sigma_a = L L^T`` the last trace is
    the sum of the square roots of the eigenvalues of ``L^T sigma_b L``; where a covariance is singular or
    nearly so, it is the nuclear norm of ``F_a F_b^T`` with ``sigma = F^T F``, which loses no digits.

    Args:
        a: Statistics, or (n, d) float features.
        b: The same; either may be of either kind.
        mean_dtype: Accumulate the means of features in this dtype, and subtract them in it;
            ``"float32"`` is what the reference evaluator does.

    Returns:
        The distance in squared feature units, never negative.

    Raises:
        FeatureError: Feature dimensions differ, values are not finite, or a sigma is not a covariance.
        UndefinedMetricError: Fewer than two rows.
    """
    p, q = _Gaussian.of(a, mean_dtype), _Gaussian.of(b, mean_dtype)
    if p.mu.size != q.mu.size:
        raise FeatureError(
            f"features of {p.mu.size} and of {q.mu.size} dimensions cannot be compared; "
            "use the same layer of the same extractor for both"
        )
    difference = p.mu - q.mu
    distance = float(difference @ difference) + p.trace + q.trace - 2 * _trace_sqrt_product(p, q)
    return max(distance, 0.0)  # the true value is not negative, so this only removes rounding


@dataclass(frozen=True, eq=False)
class _Gaussian:
    """One side of the distance: its covariance as a matrix, or as a factor F with sigma = F^T F.

    Of `sigma` the diagonal and the upper triangle count; the other may hold anything.
    """

    mu: Floats
    trace: float
    sigma: NDArray[np.float64] | None
    thin_factor: NDArray[np.float64] | None

    @classmethod
    def of(cls, source: Statistics | Floats, mean_dtype: str) -> _Gaussian:
        if isinstance(source, Statistics):
            mu = source.mu if mean_dtype == "float32" else source.mu.astype(np.float64)
            return cls(mu, float(np.trace(source.sigma)), source.sigma, None)
        n, dimensions = source.shape
        if n < 2:
            raise UndefinedMetricError(
                f"the Fréchet distance of {n} image is undefined; give at least two, better 10,000 images"
            )
        if not is_rank_deficient(n, dimensions):
            moments = Moments(dimensions)
            moments.update(source)
            mu, sigma = moments.mean, moments._upper_covariance()
            trace, factor = float(np.trace(sigma)), None
        else:
            mu, sigma = source.mean(axis=0, dtype=np.float64), None
            check_features(source, "features")
            factor = (source - mu) / np.sqrt(n - 1)
            trace = float(np.vdot(factor, factor))
        return cls(source.mean(axis=0) if mean_dtype == "float32" else mu, trace, sigma, factor)

    def factor(self) -> NDArray[np.float64]:
        """(r, d) F with sigma = F^T F and r the numerical rank."""
        if self.thin_factor is not None:
            return self.thin_factor
        assert self.sigma is not None
        values, vectors = linalg.eigh(self.sigma, lower=False, driver="evd")
        noise = len(values) * np.finfo(np.float64).eps * abs(values).max()
        # Files may carry float32 covariances, whose zero eigenvalues come out at 1e-7 of the largest.
        if values[0] < -_ASYMMETRY * values[-1]:
            raise FeatureError(
                f"sigma has the eigenvalue {values[0]:.3g} next to {values[-1]:.3g}; expected a covariance "
                "matrix, which has none below zero; check which array was stored as sigma"
            )
        kept = values > noise
        factor: NDArray[np.float64] = (vectors[:, kept] * np.sqrt(values[kept])).T
        return factor


def _trace_sqrt_product(p: _Gaussian, q: _Gaussian) -> float:
    """The trace of sqrtm(sigma_p sigma_q)."""
    if p.sigma is not None and q.sigma is not None:
        trace = _trace_from_eigenvalues(p.sigma, q.sigma)
        if trace is not None:
            return trace
    return float(linalg.svdvals(p.factor() @ q.factor().T).sum())


def _trace_from_eigenvalues(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """The trace of sqrtm(a b), from upper triangles; None where one of the two is singular to rounding."""
    try:
        values = linalg.eigh(a, b, lower=False, type=2, eigvals_only=True, driver="gv", check_finite=False)
    except linalg.LinAlgError:  # no Cholesky factor of b
        return None
    if values[0] <= np.finfo(np.float64).eps * values[-1]:
        return None
    return float(np.sqrt(values).sum())


@dataclass(frozen=True)
class FrechetDistance:
    """FID (``layer="pool"``) or sFID (``layer="spatial"``) of the samples to the reference.

    Statistics that a file carries replace those of its images. ``mean_dtype="float32"`` is the reference
    evaluator's arithmetic, ``"float64"`` the exact one.
    """

    shared: ClassVar[bool] = False

    layer: Literal["pool", "spatial"] = "pool"
    mean_dtype: Literal["float32", "float64"] = "float64"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The one layer."""
        return (self.layer,)

    @property
    def names(self) -> tuple[str, ...]:
        """``("fid",)`` or ``("sfid",)``."""
        return ("fid",) if self.layer == "pool" else ("sfid",)

    def __call__(
        self,
        reference: FeatureSet,
        samples: FeatureSet,
        *,
        device: str = "cpu",
        progress: Progress | None = None,
        spread: Spread | None = None,
    ) -> tuple[Score, ...]:
        """One score, ``"fid"`` or ``"sfid"``, in squared feature units; lower is better.

        Raises:
            UndefinedMetricError: A side has neither features nor statistics, or fewer than two images.
            FeatureError: The sides do not fit together.
        """
        del device, progress, spread  # a second of float64 algebra, on the host
        a, b = (
            batch.statistics.get(self.layer) or required_features(batch, self.layer)
            for batch in (reference, samples)
        )
        value = frechet_distance(a, b, mean_dtype=self.mean_dtype)
        return (Score(name=self.names[0], value=value, better="lower", parameters=asdict(self)),)
