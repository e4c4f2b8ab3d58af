"""Inception Score of the samples.

Salimans et al. 2016, "Improved Techniques for Training GANs", section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
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

__all__ = [
    "InceptionScore",
    "ShuffledInceptionScore",
    "SplitScores",
    "inception_influence",
    "inception_score",
]

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
    return _score(logits, _parts_of_size(len(logits), split_size), dtype)


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
    return _influence(logits, _parts_of_size(len(logits), split_size), classes)


def _parts_of_size(n: int, split_size: int) -> list[slice]:
    """Consecutive splits of so many images; the last may be shorter."""
    if split_size < 1:
        raise InputError(f"split_size is {split_size}; expected at least 1 image in a split")
    if not n:
        raise UndefinedMetricError("the Inception Score of no images is undefined; give at least one image")
    return [slice(start, min(start + split_size, n)) for start in range(0, n, split_size)]


def _score(logits: NDArray[np.floating], parts: Sequence[slice], dtype: str) -> SplitScores:
    check_rows(logits, "logits")
    splits = np.array([_split_score(logits[part].astype(dtype, copy=False)) for part in parts])
    std = float(splits.std()) if len(splits) > 1 else None
    return SplitScores(float(splits.mean()), std, splits)


def _influence(
    logits: NDArray[np.floating], parts: Sequence[slice], classes: NDArray[np.int64] | None
) -> Influence:
    value = _score(logits, parts, "float64").mean
    n = len(logits)
    if min(part.stop - part.start for part in parts) < 2:
        raise UndefinedMetricError(
            f"a split of one image ({n:,} images in {len(parts):,} splits) has no standard error; give "
            "images that fill the splits"
        )
    psi = np.empty(n)
    sums = np.zeros((2, logits.shape[1]))
    negative_entropy = 0.0
    for part in parts:
        p = _softmax(logits[part].astype(np.float64, copy=False))
        information = (p * _log(p)).sum(axis=1)
        divergence = information - p @ _log(p.mean(axis=0))
        deviation = divergence - divergence.mean()
        psi[part] = n / (len(parts) * len(p)) * np.exp(divergence.mean()) * deviation
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
        scores: Its name.
    """

    needs: ClassVar[Mapping[str, Need]] = {"inception:logits": "rows"}
    uses_reference: ClassVar[bool] = False

    split_size: int = 5000
    dtype: Literal["float32", "float64"] = "float32"
    scores: tuple[ScoreSpec, ...] = (
        ScoreSpec(name="inception_score", title="Inception Score", higher_is_better=True),
    )

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


@dataclass(frozen=True)
class ShuffledInceptionScore:
    """The Inception Score as torch-fidelity computes it: in float64, of shuffled images in equal splits.

    ``RandomState(seed)`` shuffles the images, so the score depends on their order a little.

    Attributes:
        splits: How many splits. They differ by one image at most.
        seed: Of the shuffle.
        scores: Its name.
    """

    needs: ClassVar[Mapping[str, Need]] = InceptionScore.needs
    uses_reference: ClassVar[bool] = False
    depends_on_order: ClassVar[bool] = True

    splits: int = 10
    seed: int = 2020
    scores: tuple[ScoreSpec, ...] = InceptionScore.scores

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """One score, with the standard deviation over its splits.

        Raises:
            UndefinedMetricError: The samples have no logits, or there are fewer images than splits.
            InputError: There are no splits.
        """
        del reference, run
        logits = samples.rows("inception:logits")
        order, parts = self._drawn(len(logits))
        result = _score(logits[order], parts, "float64")
        name = self.scores[0].name
        return (Score(name=name, value=result.mean, std=result.std, parameters=parameters(self)),)

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, Influence]:
        """Influence values of the score; see :func:`inception_influence`.

        Raises:
            UndefinedMetricError: The samples have no logits, or a split has fewer than two images.
            InputError: There are no splits.
        """
        del reference, run
        logits = samples.rows("inception:logits")
        order, parts = self._drawn(len(logits))
        found = _influence(logits[order], parts, None)
        psi = np.empty_like(found.samples)
        psi[order] = found.samples
        classes = classes_of(samples, "inception:logits", len(logits))
        return {self.scores[0].name: replace(found, samples=psi, classes=classes)}

    def _drawn(self, n: int) -> tuple[NDArray[np.int64], list[slice]]:
        """The order of the images, and the splits of them in this order."""
        if self.splits < 1:
            raise InputError(f"{self.splits} splits; expected at least 1, such as 10")
        if n < self.splits:
            raise UndefinedMetricError(
                f"the Inception Score of {n} image{'' if n == 1 else 's'} in {self.splits} splits is "
                f"undefined; give at least {self.splits} images, better 50,000"
            )
        bounds = [index * n // self.splits for index in range(self.splits + 1)]
        parts = [slice(*each) for each in pairwise(bounds)]
        return np.random.RandomState(self.seed).permutation(n).astype(np.int64), parts
