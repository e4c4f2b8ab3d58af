"""Fréchet distance between two Gaussians: FID on pool features, sFID on spatial ones.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
equation 6; Nash et al. 2021, "Generating Images with Sparse Representations", for the spatial features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from evalkit.deviations import Influence
from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.features.moments import MAX_ASYMMETRY, Floats, Gaussian, Moments, check_rows
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import Need, parameters, with_classes
from evalkit.metrics.frechet_influence import Cloud, frechet_influence, needs_halves
from evalkit.metrics.kept import Kept
from evalkit.results import Score, ScoreSpec
from evalkit.system.devices import accelerator, float64_device, resolve_device
from evalkit.system.run import Run

__all__ = [
    "FD",
    "FID",
    "SFID",
    "FrechetDistance",
    "FrechetEstimate",
    "frechet_distance",
    "frechet_estimate",
    "is_rank_deficient",
]


def is_rank_deficient(n: int, dimensions: int) -> bool:
    """Whether the covariance of `n` rows of `dimensions` features is singular, which biases the distance."""
    return n <= dimensions


def frechet_distance(
    a: Gaussian | Floats, b: Gaussian | Floats, *, mean_dtype: Literal["float32", "float64"] = "float64"
) -> float:
    """``|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 sqrtm(sigma_a sigma_b))``.

    Heusel et al. 2017, equation 6. No matrix square root is taken: with ``sigma_a = L L^T`` the last trace is
    the sum of the square roots of the eigenvalues of ``L^T sigma_b L``; where a covariance is singular or
    nearly so, it is the nuclear norm of ``F_a F_b^T`` with ``sigma = F^T F``, which loses no digits.

    Args:
        a: A Gaussian, or (n, d) float features.
        b: The same; either may be of either kind.
        mean_dtype: Accumulate the means of features in this dtype, and subtract them in it;
            ``"float32"`` is what the reference evaluator does.

    Returns:
        The distance in squared feature units, never negative.

    Raises:
        FeatureError: Feature dimensions differ, values are not finite, or a sigma is not a covariance.
        UndefinedMetricError: Fewer than two rows.
    """
    return _distance(_Side.of(a, mean_dtype), _Side.of(b, mean_dtype))


def _distance(p: _Side, q: _Side) -> float:
    if p.mu.size != q.mu.size:
        raise FeatureError(
            f"features of {p.mu.size} and of {q.mu.size} dimensions cannot be compared; "
            "use the same layer of the same extractor for both"
        )
    difference = p.mu - q.mu
    distance = float(difference @ difference) + p.trace + q.trace - 2 * _trace_sqrt_product(p, q)
    return max(distance, 0.0)  # the true value is not negative, so this only removes rounding


@dataclass(frozen=True, eq=False)
class _Side:
    """One side of the distance: its covariance as a matrix, or as a factor F with sigma = F^T F.

    Of `sigma` the diagonal and the upper triangle count; the other may hold anything. `mu` is the mean that
    the distance takes, `mean` the exact one.
    """

    mu: Floats
    mean: NDArray[np.float64]
    trace: float
    sigma: NDArray[np.float64] | None
    thin_factor: NDArray[np.float64] | None

    @classmethod
    def of(cls, source: Gaussian | Floats, mean_dtype: str, device: str = "cpu") -> _Side:
        if isinstance(source, Gaussian):
            mean = source.mean.astype(np.float64)
            mu = source.mean if mean_dtype == "float32" else mean
            return cls(mu, mean, float(np.trace(source.covariance)), source.covariance, None)
        n, dimensions = source.shape
        if n < 2:
            raise UndefinedMetricError(
                f"the Fréchet distance of {n} image is undefined; give at least two, better 10,000 images"
            )
        if not is_rank_deficient(n, dimensions):
            moments = Moments.of(source, accelerator(device))
            mean, sigma = moments.mean, moments.upper_covariance()
            trace, factor = float(np.trace(sigma)), None
        else:
            mean, sigma = source.mean(axis=0, dtype=np.float64), None
            check_rows(source, "features")
            factor = (source - mean) / np.sqrt(n - 1)
            trace = float(np.vdot(factor, factor))
        return cls(source.mean(axis=0) if mean_dtype == "float32" else mean, mean, trace, sigma, factor)

    def cloud(self, rows: Floats | None) -> Cloud:
        """For influence values.

        Raises:
            UndefinedMetricError: There are no more images than features.
        """
        if self.sigma is None:
            assert rows is not None
            raise UndefinedMetricError(
                f"{len(rows):,} images of {self.mean.size:,} features have a singular covariance; give more "
                "images than features"
            )
        return Cloud(self.mean, self.sigma, rows)

    def factor(self) -> NDArray[np.float64]:
        """(r, d) F with sigma = F^T F and r the numerical rank."""
        if self.thin_factor is not None:
            return self.thin_factor
        assert self.sigma is not None
        values, vectors = linalg.eigh(self.sigma, lower=False, driver="evd")
        noise = len(values) * np.finfo(np.float64).eps * abs(values).max()
        # Files may carry float32 covariances, whose zero eigenvalues come out at 1e-7 of the largest.
        if values[0] < -MAX_ASYMMETRY * values[-1]:
            raise FeatureError(
                f"sigma has the eigenvalue {values[0]:.3g} next to {values[-1]:.3g}; expected a covariance "
                "matrix, which has none below zero; check which array was stored as sigma"
            )
        kept = values > noise
        factor: NDArray[np.float64] = (vectors[:, kept] * np.sqrt(values[kept])).T
        return factor


def _trace_sqrt_product(p: _Side, q: _Side) -> float:
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


@dataclass(frozen=True, kw_only=True)
class FrechetEstimate:
    """A Fréchet distance with its error bar. What has no value is None, and ``why`` says the reason.

    Attributes:
        value: The distance, in squared feature units.
        stderr: Standard error of ``value``, and of ``unbiased``, from the draw of samples and reference.
        stderr_sampling: From the draw of the samples alone, the reference being given.
        stderr_reference: From the draw of the reference: common to all distances to it.
        unbiased: An estimate without the bias of finitely many images, on either side. It may be negative.
        why: Reasons of what is None; empty if nothing is.
    """

    value: float
    stderr: float | None = None
    stderr_sampling: float | None = None
    stderr_reference: float | None = None
    unbiased: float | None = None
    why: str = ""


def frechet_estimate(
    reference: Gaussian | Floats, samples: Floats, *, device: str = "cpu"
) -> FrechetEstimate:
    """The Fréchet distance between features, its standard error, and an estimate for infinitely many images.

    The formulas are in :mod:`evalkit.metrics.frechet_influence`. An error bar needs more images than
    features on each side, and covariances that are not singular.

    Args:
        reference: (m, d) float features. Or a Gaussian, which is assumed to be exact and adds neither error
            nor bias.
        samples: (n, d) float features.
        device: Torch device for covariances and large products.

    Raises:
        FeatureError: Feature dimensions differ, or values are not finite.
        UndefinedMetricError: Fewer than two rows.
    """
    for name, source in (("reference", reference), ("samples", samples)):
        if not isinstance(source, Gaussian):
            check_rows(source, name)
    sides = [_Side.of(source, "float64", device) for source in (reference, samples)]
    value = _distance(*sides)
    rows = None if isinstance(reference, Gaussian) else reference
    try:
        found = frechet_influence(
            sides[0].cloud(rows),
            sides[1].cloud(samples),
            no_reference="the reference is a mean and a covariance",
            device=resolve_device(device),
        )
    except UndefinedMetricError as error:
        return FrechetEstimate(value=value, why=f"no standard error: {error}")
    return FrechetEstimate(
        value=value,
        stderr=found.stderr,
        stderr_sampling=found.stderr_sampling,
        stderr_reference=found.stderr_reference,
        unbiased=None if found.bias is None else value - found.bias,
        why="; ".join(
            f"{what}: {reason}"
            for what, reason in (
                ("no error of the reference", found.no_reference),
                ("no unbiased value", found.no_bias),
            )
            if reason
        ),
    )


# By output and dtype of the mean; the call and the influence values both need it.
_SIDES: Kept[_Side] = Kept()


@dataclass(frozen=True)
class FrechetDistance:
    """Fréchet distance of the samples to the reference, in squared feature units; lower is better.

    A Gaussian that a file carries replaces that of its images.

    Attributes:
        output: Of which network and output.
        mean_dtype: ``"float32"`` is the reference evaluator's arithmetic, ``"float64"`` the exact one.
        scores: Its name.
    """

    uses_reference: ClassVar[bool] = True

    output: str = "inception:pool"
    mean_dtype: Literal["float32", "float64"] = "float64"
    scores: tuple[ScoreSpec, ...] = (ScoreSpec(name="fid", title="FID", higher_is_better=False),)

    @property
    def needs(self) -> Mapping[str, Need]:
        """A Gaussian of the output."""
        return {self.output: "gaussian"}

    def streamed(self) -> FrechetDistance:
        """The metric for Gaussians that are summed up as features stream past, in float64."""
        return replace(self, mean_dtype="float64")

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """One score.

        Raises:
            UndefinedMetricError: A side has neither features nor a Gaussian, or fewer than two images.
            FeatureError: The sides do not fit together.
        """
        value = _distance(self._side(reference, run), self._side(samples, run))
        return (Score(name=self.scores[0].name, value=value, parameters=parameters(self)),)

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, Influence]:
        """Influence values of the score: see :func:`~evalkit.metrics.frechet_influence.frechet_influence`.

        Raises:
            UndefinedMetricError: The samples have no rows that the value is of, a side has no more images
                than features, or a covariance is singular.
            FeatureError: The sides do not fit together.
        """
        if samples.gaussian(self.output):
            raise UndefinedMetricError(
                f"of {samples.name}, mean and covariance are used, not the features of its images; give the "
                "images without statistics"
            )
        clouds = []
        for batch in (reference, samples):
            rows = None if batch.gaussian(self.output) else batch.rows(self.output)
            clouds.append(self._side(batch, run).cloud(rows))
        found = frechet_influence(
            *clouds,
            no_reference=f"of {reference.name}, mean and covariance are used, not the features of its images",
            device=float64_device(run.device),
        )
        return {self.scores[0].name: with_classes(found, reference, samples, self.output)}

    def influence_bytes(self, images: Sequence[int], width: int) -> int:
        """Memory of :meth:`influence` beyond the rows: 16 matrices, and the rows of halves where needed."""
        if is_rank_deficient(min(images), width):
            return 0
        return 8 * 16 * width**2 + 4 * width * sum(n for n in images if needs_halves(n, width))

    def _side(self, batch: BatchFeatures, run: Run) -> _Side:
        def make() -> _Side:
            return _Side.of(batch.gaussian_or_rows(self.output), self.mean_dtype, run.device)

        return _SIDES.of(batch, (self.output, self.mean_dtype, run.device), make)


FID = FrechetDistance()
SFID = FrechetDistance(
    "inception:spatial", scores=(ScoreSpec(name="sfid", title="sFID", higher_is_better=False),)
)
FD = FrechetDistance(scores=(ScoreSpec(name="fd", title="Fréchet distance", higher_is_better=False),))
