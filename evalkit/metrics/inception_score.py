"""Inception Score of the samples.

Salimans et al. 2016, "Improved Techniques for Training GANs", section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evalkit.deviations import Influence
from evalkit.errors import InputError, UndefinedMetricError
from evalkit.features.moments import check_rows
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import Need, classes_of, parameters
from evalkit.results import Score, ScoreSpec
from evalkit.system.run import Run

__all__ = ["InceptionScore", "SplitScores", "inception_influence", "inception_score"]

# Beyond this share of the score, the formula of the bias leaves too much over.
_MOST_BIAS = 0.2


class SplitScores(NamedTuple):
    """The Inception Score with the splits that it is the mean of.

    Attributes:
        mean: Mean over the splits; 1 at worst, the number of classes at best.
        std: Population standard deviation over the splits; None for a single split.
        splits: (number of splits,) score of each.
    """

    mean: float
    std: float | None
    splits: NDArray[np.floating]


def inception_score(
    logits: NDArray[np.floating], split_size: int = 5000, *, dtype: Literal["float32", "float64"] = "float32"
) -> SplitScores:
    """``exp(E_x KL(p(y|x) || p(y)))``, the mean over consecutive splits (Salimans et al. 2016, section 4).

    The images are not shuffled, and a short last split weighs as much as a full one, as in the reference
    evaluator.

    Args:
        logits: (n, classes) float class scores before the softmax.
        split_size: Images in a split.
        dtype: Arithmetic; the reference evaluator's is float32.

    Raises:
        UndefinedMetricError: There are no images.
        FeatureError: The logits are not a finite two-dimensional array.
        InputError: `split_size` is not positive.
    """
    if split_size < 1:
        raise InputError(f"split_size is {split_size}; expected at least 1 image in a split")
    if not len(logits):
        raise UndefinedMetricError("the Inception Score of no images is undefined; give at least one image")
    check_rows(logits, "logits")
    splits = np.array(
        [
            _split_score(logits[start : start + split_size].astype(dtype, copy=False))
            for start in range(0, len(logits), split_size)
        ]
    )
    std = float(splits.std()) if len(splits) > 1 else None
    return SplitScores(float(splits.mean()), std, splits)


def inception_influence(
    logits: NDArray[np.floating], split_size: int = 5000, *, classes: NDArray[np.int64] | None = None
) -> Influence:
    """Influence values of :func:`inception_score`, and its bias.

    In a split of n_s of n images, one of S, ``psi_i = n / (S n_s) IS_s (KL_i - mean KL)``: the marginal moves
    with the image, but only in second order. That order makes the score too low, by about
    ``IS / (2 n_s) sum_c Var(p_c) / mean(p_c)`` in a split (for entropies: Miller 1955). The unbiased score is
    that of all images in one split, where the bias is smallest, corrected.

    Args:
        logits: (n, classes) float class scores before the softmax; at least two images.
        split_size: Images in a split.
        classes: (n,) class of each image where these are balanced.

    Raises:
        UndefinedMetricError: A split has a single image, so that nothing is known of its spread.
        FeatureError: The logits are not a finite two-dimensional array.
        InputError: `split_size` is not positive.
    """
    value = inception_score(logits, split_size, dtype="float64").mean
    n = len(logits)
    starts = range(0, n, split_size)
    if min(split_size, n - starts[-1]) < 2:
        raise UndefinedMetricError(
            f"a split of one image ({n:,} images in splits of {split_size:,}) has no standard error; leave "
            "out the last image, or give more"
        )
    psi = np.empty(n)
    sums = np.zeros((2, logits.shape[1]))
    negative_entropy = 0.0
    for start in starts:
        split = slice(start, start + split_size)
        p = _softmax(logits[split].astype(np.float64, copy=False))
        information = (p * _log(p)).sum(axis=1)
        divergence = information - p @ _log(p.mean(axis=0))
        deviation = divergence - divergence.mean()
        psi[split] = n / (len(starts) * len(p)) * np.exp(divergence.mean()) * deviation
        sums += p.sum(axis=0), np.square(p).sum(axis=0)
        negative_entropy += information.sum()
    bias, why = _bias(value, negative_entropy / n, sums / n, float(psi.var()) / value**2, n)
    return Influence(images=n, samples=psi - psi.mean(), classes=classes, bias=bias, no_bias=why)


def _bias(
    value: float, negative_entropy: float, means: NDArray[np.float64], variance: float, n: int
) -> tuple[float | None, str]:
    """What ``value`` exceeds the score of infinitely many images by; or why that cannot be said.

    Args:
        value: The mean over splits.
        negative_entropy: Mean over the images of ``sum_c p_c log p_c``.
        means: (2, classes) means of p_c and of its square.
        variance: Of the images' divergences.
        n: Number of images.
    """
    marginal = means[0]
    spread = np.divide(means[1] - marginal**2, marginal, out=np.zeros_like(marginal), where=marginal > 0)
    low = float(spread.sum()) / (2 * (n - 1))
    if low > _MOST_BIAS:
        need = int(np.ceil(n * low / _MOST_BIAS))
        return None, f"{n:,} images are too few for this many classes; give at least {need:,}"
    # Of the exponential, whose argument also varies, the second order makes the score too high.
    of_all = np.exp(negative_entropy - marginal @ _log(marginal) + low) * (1 - variance / (2 * n))
    return value - float(of_all), ""


def _split_score(logits: NDArray[np.floating]) -> np.floating:
    p = _softmax(logits)
    divergence = _log(p)
    divergence -= _log(p.mean(axis=0, keepdims=True))
    divergence *= p
    score: np.floating = np.exp(divergence.sum(axis=1).mean())
    return score


def _softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """(n, classes) probabilities, in the dtype of the logits."""
    p: NDArray[np.floating] = logits - logits.max(axis=1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    return p


def _log(p: NDArray[np.floating]) -> NDArray[np.floating]:
    """Logarithm, and 0 where p underflowed to 0: such a class contributes p log p = 0."""
    logarithms: NDArray[np.floating] = np.log(p, out=np.zeros_like(p), where=p > 0)
    return logarithms


@dataclass(frozen=True)
class InceptionScore:
    """The Inception Score of the samples; the reference is not looked at.

    Attributes:
        split_size: Images in a split.
        dtype: Arithmetic; the reference evaluator's is float32.
    """

    scores: ClassVar[tuple[ScoreSpec, ...]] = (
        ScoreSpec(name="inception_score", title="Inception Score", higher_is_better=True),
    )
    needs: ClassVar[Mapping[str, Need]] = {"inception:logits": "rows"}
    uses_reference: ClassVar[bool] = False

    split_size: int = 5000
    dtype: Literal["float32", "float64"] = "float32"

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """One score, with the standard deviation over its splits.

        Raises:
            UndefinedMetricError: The samples have no logits, or there are no samples.
        """
        del reference, run
        logits = samples.rows("inception:logits")
        result = inception_score(logits, self.split_size, dtype=self.dtype)
        name = self.scores[0].name
        return (Score(name=name, value=result.mean, std=result.std, parameters=parameters(self)),)

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, Influence]:
        """Influence values of the score; see :func:`inception_influence`.

        Raises:
            UndefinedMetricError: The samples have no logits, or a split has a single image.
        """
        del reference, run
        logits = samples.rows("inception:logits")
        classes = classes_of(samples, "inception:logits", len(logits))
        return {self.scores[0].name: inception_influence(logits, self.split_size, classes=classes)}
