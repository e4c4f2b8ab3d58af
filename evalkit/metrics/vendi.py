"""Vendi score: how many different images there are among the samples.

Friedman and Dieng 2023, "The Vendi Score: A Diversity Evaluation Metric for Machine Learning".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.deviations import Influence
from evalkit.errors import UndefinedMetricError
from evalkit.features.moments import check_rows
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import check_directions, parameters, with_classes
from evalkit.metrics.kept import Kept
from evalkit.metrics.on_rows import OnRows
from evalkit.results import Score, ScoreSpec
from evalkit.system.devices import float64_device
from evalkit.system.run import Run

__all__ = ["Spectrum", "Vendi", "spectrum_of", "vendi_influence", "vendi_score"]

# Rows of features that are converted to float64 at a time.
_ROWS = 4096

# Beyond this bias of the entropy, the formula of the bias leaves too much over.
_MOST_BIAS = 0.2


class Spectrum(NamedTuple):
    """Eigenvalues of the cosine similarities between all images, over their number; they add up to 1.

    Attributes:
        values: (r,) float64, those above zero.
        vectors: (d, r) the directions of features that they belong to; None where there are fewer images than
            features.
    """

    values: Tensor
    vectors: Tensor | None

    @property
    def entropy(self) -> float:
        """``-sum lam log lam``, in nats."""
        return float(-(self.values @ self.values.log()))


def vendi_score(samples: NDArray[np.floating], *, device: str = "cpu") -> float:
    """``exp(-sum lam log lam)`` (Friedman and Dieng 2023, definition 3.1), in float64.

    ``lam`` are the eigenvalues of ``K / n``, with K the cosine similarities of all images. Those above zero
    are the ones of the d x d matrix ``sum z_i z_i^T / n`` of the features at length 1, which is smaller.

    Args:
        samples: (n, d) float features.
        device: torch device with float64; ``mps`` is replaced by the CPU.

    Returns:
        Between 1, where all images are alike, and the smaller of n and d.

    Raises:
        UndefinedMetricError: There are no images, or one's features are zero.
        FeatureError: Features are not (n, d) finite floats.
    """
    return float(np.exp(spectrum_of(samples, device=device).entropy))


def spectrum_of(samples: NDArray[np.floating], *, device: str = "cpu") -> Spectrum:
    """What :func:`vendi_score` is computed from; arguments and errors are the same."""
    check_rows(samples, "samples")
    if not len(samples):
        raise UndefinedMetricError("the Vendi score of no images is undefined; give at least one image")
    check_directions(samples, "samples")
    n, d = samples.shape
    with torch.inference_mode():
        blocks = _directions(samples, device)
        if n < d:
            z = torch.cat(list(blocks))
            values, vectors = torch.linalg.eigvalsh(z @ z.T / n), None
        else:
            start = torch.zeros((), device="cpu")
            values, vectors = torch.linalg.eigh(sum((z.T @ z for z in blocks), start) / n)
        kept = values > len(values) * torch.finfo(values.dtype).eps
        return Spectrum(values[kept], None if vectors is None else vectors[:, kept])


def vendi_influence(samples: NDArray[np.floating], spectrum: Spectrum, *, device: str = "cpu") -> Influence:
    """Influence values of :func:`vendi_score`, and its bias.

    With ``A = sum w_i z_i z_i^T`` and H its entropy, the derivative of the score in the weight of an image is
    ``psi_i = exp(H) (-z_i^T log(A) z_i - H)``. The second order of the entropy, for which matrices are
    differentiated as in Daleckii and Krein 1965, makes the score of few images too low:
    ``E H_n - H = -1/(2n) sum_jk Var(z_j z_k) (log lam_j - log lam_k) / (lam_j - lam_k)``, in the basis of
    eigenvectors; of equal eigenvalues the fraction is ``1 / lam_j``.

    Args:
        samples: (n, d) float features.
        spectrum: Of them.
        device: torch device with float64; ``mps`` is replaced by the CPU.

    Raises:
        UndefinedMetricError: There are no more images than features.
    """
    n, d = samples.shape
    if spectrum.vectors is None or n <= d:
        raise UndefinedMetricError(
            f"{n:,} images of {d:,} features do not show how many directions there are; give more images "
            "than features"
        )
    lam = spectrum.values
    with torch.inference_mode():
        squares = (z.matmul(spectrum.vectors).square_() for z in _directions(samples, device))
        products, parts = torch.zeros(len(lam), len(lam), dtype=lam.dtype, device=lam.device), []
        for block in squares:
            products += block.T @ block
            parts.append(-block @ lam.log())
        variances = products / n - torch.diag(lam**2)
        of_entropy = torch.cat(parts).cpu().numpy()
        low = float((variances * _divided_differences(lam)).sum()) / (2 * n)
    of_entropy -= of_entropy.mean()
    score = float(np.exp(spectrum.entropy))
    # Of the exponential, whose argument also varies, the second order makes the score too high.
    unbiased = float(np.exp(spectrum.entropy + low)) * (1 - float(of_entropy.var()) / (2 * n))
    few = low > _MOST_BIAS
    return Influence(
        images=n,
        samples=score * of_entropy,
        bias=None if few else score - unbiased,
        no_bias=f"{n:,} images are too few for this many directions" if few else "",
    )


def _directions(samples: NDArray[np.floating], device: str) -> Iterator[Tensor]:
    """Blocks of float64 rows at length 1."""
    target = float64_device(device)
    for start in range(0, len(samples), _ROWS):
        rows = torch.from_numpy(np.ascontiguousarray(samples[start : start + _ROWS])).to(target)
        yield torch.nn.functional.normalize(rows.double(), eps=0)


def _divided_differences(lam: Tensor) -> Tensor:
    """``(log lam_j - log lam_k) / (lam_j - lam_k)``, and its limit where they are equal."""
    total = lam[:, None] + lam
    ratio = (lam[:, None] - lam) / total
    near = ratio.abs() < 1e-6
    return torch.where(near, 2 / total, 2 * torch.atanh(ratio) / (ratio * total).masked_fill(near, 1))


# By the samples; the call and the influence values both need it.
_SPECTRA: Kept[Spectrum] = Kept()


@dataclass(frozen=True)
class Vendi(OnRows):
    """The Vendi score of the samples; the reference is not looked at. See :func:`vendi_score`.

    Attributes:
        output: Of which network and output.
        scores: Its name.
    """

    uses_reference: ClassVar[bool] = False

    output: str = "inception:pool"
    scores: tuple[ScoreSpec, ...] = (ScoreSpec(name="vendi", title="Vendi score", higher_is_better=True),)

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """One score.

        Raises:
            UndefinedMetricError: The samples have no such features, or one's features are zero.
        """
        del reference
        value = float(np.exp(self._spectrum(samples, run).entropy))
        return (Score(name=self.scores[0].name, value=value, parameters=parameters(self)),)

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, Influence]:
        """Influence values of the score; see :func:`vendi_influence`.

        Raises:
            UndefinedMetricError: The samples have no such features, or no more images than features.
        """
        spectrum = self._spectrum(samples, run)
        found = vendi_influence(samples.rows(self.output), spectrum, device=run.device)
        return {self.scores[0].name: with_classes(found, reference, samples, self.output)}

    def influence_bytes(self, images: Sequence[int], width: int) -> int:
        """Memory of :meth:`influence` beyond the rows: 8 matrices."""
        return 8 * 8 * width**2 if images[-1] > width else 0

    def _spectrum(self, samples: BatchFeatures, run: Run) -> Spectrum:
        def make() -> Spectrum:
            return spectrum_of(samples.rows(self.output), device=run.device)

        return _SPECTRA.of(samples, self.output, make)
