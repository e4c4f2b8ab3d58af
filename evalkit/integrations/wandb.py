"""Scores in Weights & Biases."""

from __future__ import annotations

from typing import Any

from evalkit.integrations import scalars
from evalkit.results import Comparison

__all__ = ["log_to_wandb"]


def log_to_wandb(
    run: Any, comparison: Comparison, step: int | None = None, *, prefix: str = "evalkit/"
) -> None:
    """Log the scores of one step, all in one call.

    Args:
        run: What ``wandb.init`` returned.
        comparison: What an evaluator computed.
        step: Of the training; None for the run's own. Steps may not go back.
        prefix: See :func:`evalkit.integrations.scalars`.
    """
    run.log(scalars(comparison, prefix), step=step)
