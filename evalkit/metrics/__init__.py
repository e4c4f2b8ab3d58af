"""The metrics: arrays in, numbers out.

`PROTOCOLS` says which metrics a comparison computes, in the reference evaluator's order of printing. A new
metric is one file and one row here.
"""

from evalkit.metrics.base import FeatureSet, Metric, Progress
from evalkit.metrics.frechet import FrechetDistance, Moments, Statistics, frechet_distance, is_rank_deficient
from evalkit.metrics.inception_score import InceptionScore, inception_score
from evalkit.metrics.neighbours import PrecisionRecall, precision_recall

__all__ = [
    "PROTOCOLS",
    "FeatureSet",
    "FrechetDistance",
    "InceptionScore",
    "Metric",
    "Moments",
    "PrecisionRecall",
    "Progress",
    "Statistics",
    "frechet_distance",
    "inception_score",
    "is_rank_deficient",
    "precision_recall",
]

PROTOCOLS: dict[str, tuple[Metric, ...]] = {
    # The arithmetic of OpenAI's evaluator, which the published ADM numbers come from.
    "adm": (
        InceptionScore(dtype="float32"),
        FrechetDistance("pool", mean_dtype="float32"),
        FrechetDistance("spatial", mean_dtype="float32"),
        PrecisionRecall(arithmetic="float16"),
    ),
    # The same definitions without rounding worth mentioning.
    "exact": (
        InceptionScore(dtype="float64"),
        FrechetDistance("pool", mean_dtype="float64"),
        FrechetDistance("spatial", mean_dtype="float64"),
        PrecisionRecall(arithmetic="exact"),
    ),
}
