"""Scores where training is watched: Lightning, torchmetrics, TensorBoard, Weights & Biases, model cards.

Each is a small file, loaded by who uses it; the package that it is for is imported when it is called.
"""

from __future__ import annotations

from evalkit.results import Comparison

__all__ = ["scalars"]


def scalars(comparison: Comparison, prefix: str = "evalkit/") -> dict[str, float]:
    """What loggers take: every score, and where they are known its standard error and value without bias.

    Args:
        comparison: What an evaluator computed.
        prefix: Before each name: ``evalkit/fid``, ``evalkit/fid_stderr``, ``evalkit/fid_unbiased``.
    """
    found: dict[str, float] = {}
    for score in comparison.scores:
        for suffix, value in (("", score.value), ("_stderr", score.stderr), ("_unbiased", score.unbiased)):
            if value is not None:
                found[f"{prefix}{score.name}{suffix}"] = value
    return found
