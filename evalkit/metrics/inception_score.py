"""Inception Score of the samples.

Salimans et al. 2016, "Improved Techniques for Training GANs", section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, UndefinedMetricError
from evalkit.features.moments import check_rows
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import Need, parameters
from evalkit.results import Score, ScoreSpec
from evalkit.system.run import Run

__all__ = ["InceptionScore", "SplitScores", "inception_score"]


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


def _split_score(logits: NDArray[np.floating]) -> np.floating:
    p = logits - logits.max(axis=1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    divergence = _log(p)
    divergence -= _log(p.mean(axis=0, keepdims=True))
    divergence *= p
    score: np.floating = np.exp(divergence.sum(axis=1).mean())
    return score


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
