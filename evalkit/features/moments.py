"""Mean and covariance of features: accumulated from rows, or read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.system.ranks import Ranks

if TYPE_CHECKING:
    import torch

__all__ = ["Gaussian", "Moments", "check_rows"]

Floats = NDArray[np.float32] | NDArray[np.float64]

# Rows of features converted to float64 at a time: 16 MiB at 2048 features, so that they fit into CPU caches.
_ROWS = 1024

# The same for a GPU: 128 MiB.
_DEVICE_ROWS = 8192

# Rows checked at a time, which bounds temporary memory.
_CHECKED_ROWS = 4096

MAX_ASYMMETRY = 1e-5
"""Largest asymmetry of a covariance, relative to its largest entry, that float32 rounding can cause."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of the features of one batch.

    Attributes:
        mean: (d,) float32 or float64; other dtypes become float64.
        covariance: (d, d) float64, symmetric.
        n: Number of images; None if unknown.

    Raises:
        FeatureError: Shapes do not match, a value is not finite, or the covariance is not symmetric.
    """

    mean: Floats
    covariance: NDArray[np.float64]
    n: int | None = None

    def __post_init__(self) -> None:
        mean, covariance = np.asarray(self.mean), np.asarray(self.covariance, np.float64)
        if mean.dtype not in (np.float32, np.float64):
            mean = mean.astype(np.float64)
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size) or not mean.size:
            raise FeatureError(
                f"the mean has shape {mean.shape} and the covariance {covariance.shape}; "
                "expected (d,) and (d, d); compute them again from the images"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise FeatureError(
                "mean or covariance contain NaN or infinity; expected finite numbers; "
                "compute them again from the images"
            )
        asymmetry = np.abs(covariance - covariance.T).max()
        if asymmetry > MAX_ASYMMETRY * np.abs(covariance).max():
            raise FeatureError(
                f"the covariance is not symmetric (entries differ by {asymmetry:.3g} from their mirror "
                "images); check which array was stored as sigma"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of the values and of ``n``, independent of the file type.

        It does not depend on the dtype, but rounding values to float32 changes it.
        """
        found = hashlib.sha256(f"gaussian {self.mean.size} {self.n}\n".encode())
        for array in (self.mean, self.covariance):
            found.update(np.ascontiguousarray(array, "<f8").data)
        return found.hexdigest()


class Moments:
    """Mean and covariance of rows that arrive in batches, in float64 and bounded memory.

    Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", equation 2.1. Workers can
    accumulate shares separately and merge them: the result equals a single pass over all rows up to rounding.

    Args:
        dimensions: Number of features per row.
        device: Torch device for the sums, which must support float64; None for the CPU. Results are equal up
            to rounding.
    """

    def __init__(self, dimensions: int, device: torch.device | None = None) -> None:
        self.n = 0
        self.dimensions = dimensions
        self._mean = np.zeros(dimensions)
        self._scatter = _Scatter(dimensions) if device is None else _ScatterOn(device, dimensions)

    @classmethod
    def of(cls, rows: Floats, device: torch.device | None = None) -> Moments:
        """The moments of (n, d) rows."""
        moments = cls(rows.shape[1], device)
        moments.update(rows)
        return moments

    def gaussian(self) -> Gaussian:
        """Mean, covariance and number of rows.

        Raises:
            UndefinedMetricError: There are fewer than two rows.
        """
        return Gaussian(mean=self.mean, covariance=self.covariance, n=self.n)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(d,) mean.

        Raises:
            UndefinedMetricError: There are no rows.
        """
        if self.n < 1:
            raise UndefinedMetricError("the mean of no images is undefined; give at least one image")
        return self._mean.copy()

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(d, d) unbiased covariance (divisor n - 1), as ``np.cov(rows, rowvar=False)``.

        Raises:
            UndefinedMetricError: There are fewer than two rows.
        """
        upper = self.upper_covariance()
        covariance: NDArray[np.float64] = np.triu(upper) + np.triu(upper, 1).T
        return covariance

    def upper_covariance(self) -> NDArray[np.float64]:
        """(d, d) covariance in Fortran order; only the upper triangle is valid."""
        if self.n < 2:
            raise UndefinedMetricError(
                f"the covariance of {self.n} images is undefined; give at least two images"
            )
        upper: NDArray[np.float64] = self._scatter.upper / (self.n - 1)
        return upper

    def update(self, batch: Floats) -> None:
        """Add the rows of `batch`, (n, d) of any floating-point dtype.

        Raises:
            FeatureError: The batch has a different width, or contains NaN or infinity.
        """
        if batch.ndim != 2 or batch.shape[1] != self._mean.size:
            raise FeatureError(
                f"features have shape {batch.shape}; expected (n, {self._mean.size}); "
                "do not mix features of different networks or outputs"
            )
        check_rows(batch, "batch")
        self._scatter.update(batch, self._move)

    def merge(self, other: Moments) -> None:
        """Add the rows of `other`, which is not modified.

        Raises:
            FeatureError: `other` has a different width.
        """
        if other._mean.size != self._mean.size:
            raise FeatureError(
                f"moments of {other._mean.size} features cannot be merged into moments of {self._mean.size}; "
                "do not mix features of different networks or outputs"
            )
        if other.n:
            self._scatter.merge(other._scatter, self._move(other.n, other._mean))

    def across(self, ranks: Ranks) -> Moments:
        """The moments of the rows of all ranks, equal to those of a single process up to float64 rounding."""
        if ranks.size == 1:
            return self
        found = Moments(self.dimensions)
        sums = ranks.sum(np.append(self.n * self._mean, self.n))
        found.n = int(sums[-1])
        if found.n:
            found._mean = sums[:-1] / found.n
            shift = self._mean - found._mean
            scatter = self._scatter.upper + self.n * np.outer(shift, shift)
            found._scatter.upper = np.asfortranarray(ranks.sum(scatter))
        return found

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`restore` rebuilds this object."""
        return {"n": np.array(self.n), "mean": self._mean, "scatter": self._scatter.upper}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore what :meth:`state` returned. Adding the same rows then gives bit-identical results."""
        self.n = int(state["n"])
        self._mean = np.array(state["mean"], np.float64)
        self._scatter.upper = np.array(state["scatter"], np.float64, order="F")

    def __deepcopy__(self, memo: dict[int, Any]) -> Moments:
        """A copy on the same device."""
        del memo
        found = Moments(self.dimensions, self._scatter.device)
        found.restore(self.state())
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle for the CPU, because the receiver may have no GPU."""
        return _restored, (self.dimensions, self.state())

    def _move(self, n: int, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Update the count and the mean with `n` more rows of the given mean.

        Returns:
            (d,) Row to add to the scatter besides the centred rows, which accounts for the shift of the mean.
        """
        total = self.n + n
        shift = mean - self._mean
        row: NDArray[np.float64] = shift * np.sqrt(self.n * n / total)
        self._mean = self._mean + shift * (n / total)
        self.n = total
        return row


def _restored(dimensions: int, state: Mapping[str, NDArray[Any]]) -> Moments:
    moments = Moments(dimensions)
    moments.restore(state)
    return moments


Move = Callable[[int, NDArray[np.float64]], NDArray[np.float64]]
"""Takes a number of rows and their mean; returns the additional row for the scatter (``Moments._move``)."""


class _Scatter:
    """The sum of outer products of the centred rows.

    Attributes:
        device: Its torch device; None for the CPU.
        upper: (d, d) float64, Fortran order; only the upper triangle is valid.
    """

    device: torch.device | None = None

    def __init__(self, dimensions: int) -> None:
        self.upper: NDArray[np.float64] = np.zeros((dimensions, dimensions), order="F")

    def update(self, batch: Floats, move: Move) -> None:
        """Add (n, d) rows."""
        for start in range(0, len(batch), _ROWS):
            block = batch[start : start + _ROWS]
            rows = np.empty((len(block) + 1, batch.shape[1]))
            rows[:-1] = block
            mean = rows[:-1].mean(axis=0)
            rows[:-1] -= mean
            rows[-1] = move(len(block), mean)  # so that a single rank-k update suffices
            self._add(rows)

    def merge(self, other: _Scatter | _ScatterOn, row: NDArray[np.float64]) -> None:
        """Add another scatter, and a row."""
        self.upper += other.upper
        self._add(row[None])

    def _add(self, rows: NDArray[np.float64]) -> None:
        self.upper = linalg.blas.dsyrk(1.0, rows.T, beta=1.0, c=self.upper, overwrite_c=True)


class _ScatterOn:
    """The same on a torch device with fast float64 products."""

    def __init__(self, device: torch.device, dimensions: int) -> None:
        import torch

        # A tensor created in inference mode cannot be modified in place outside of it.
        with torch.inference_mode(False):
            self._whole = torch.zeros((dimensions, dimensions), dtype=torch.float64, device=device)
        self.device = self._whole.device  # with an index: "cuda" alone follows the current device

    @property
    def upper(self) -> NDArray[np.float64]:
        """A copy on the CPU."""
        return np.array(self._whole.cpu().numpy(), order="F")

    @upper.setter
    def upper(self, upper: NDArray[np.float64]) -> None:
        self._whole.copy_(self._placed(upper))

    def update(self, batch: Floats, move: Move) -> None:
        """Add (n, d) rows."""
        for start in range(0, len(batch), _DEVICE_ROWS):
            rows = self._placed(batch[start : start + _DEVICE_ROWS]).double()
            mean = rows.mean(dim=0)
            rows = rows - mean
            self._whole.addmm_(rows.T, rows)
            self._add(move(len(rows), mean.cpu().numpy()))

    def merge(self, other: _Scatter | _ScatterOn, row: NDArray[np.float64]) -> None:
        """Add another scatter, and a row."""
        there = other._whole if isinstance(other, _ScatterOn) else self._placed(other.upper)
        self._whole += there.to(self.device)
        self._add(row)

    def _add(self, row: NDArray[np.float64]) -> None:
        placed = self._placed(row)
        self._whole.addr_(placed, placed)

    def _placed(self, array: Floats) -> torch.Tensor:
        import torch

        # torch does not support negative strides, non-native byte order or long doubles.
        plain = np.ascontiguousarray(array, np.float32 if array.dtype == np.float32 else np.float64)
        return torch.tensor(plain, device=self.device)


def check_rows(features: NDArray[np.floating], name: str) -> None:
    """Raise FeatureError, with `name` in the message, unless `features` are (n, d), floating and finite."""
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype.kind != "f":
        raise FeatureError(
            f"{name}: features have shape {features.shape} and dtype {features.dtype}; "
            "expected (n, d) of a floating-point dtype; extract them again"
        )
    for start in range(0, len(features), _CHECKED_ROWS):
        finite = np.isfinite(features[start : start + _CHECKED_ROWS]).all(axis=1)
        if not finite.all():
            raise FeatureError(
                f"{name}: the features of image {start + int(finite.argmin())} contain NaN or infinity; "
                "expected finite numbers; check that image and extract the features again"
            )
