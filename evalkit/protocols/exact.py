"""The metrics of ADM in exact arithmetic."""

from __future__ import annotations

from dataclasses import replace

from evalkit.metrics.frechet import FID, SFID
from evalkit.metrics.inception_score import InceptionScore
from evalkit.metrics.precision_recall import PrecisionRecall
from evalkit.protocols.adm import ADM

__all__ = ["EXACT"]

EXACT = replace(
    ADM,
    name="exact",
    title="the same metrics without rounding worth mentioning",
    metrics=(FID, SFID, InceptionScore(dtype="float64"), PrecisionRecall(arithmetic="exact")),
)
