"""Scores in TensorBoard."""

from __future__ import annotations

from typing import Any

from evalkit.integrations import scalars
from evalkit.results import Comparison

__all__ = ["log_to_tensorboard"]


def log_to_tensorboard(writer: Any, comparison: Comparison, step: int, *, prefix: str = "evalkit/") -> None:
    """Write the scores of one step, and in words what should be known beside them.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        comparison: What an evaluator computed.
        step: Of the training.
        prefix: See :func:`evalkit.integrations.scalars`.
    """
    for name, value in scalars(comparison, prefix).items():
        writer.add_scalar(name, value, step)
    missing = [f"{name}: {reason}" for name, reason in comparison.missing.items()]
    if notes := [*comparison.warnings, *missing]:
        writer.add_text(f"{prefix}notes", "\n".join(f"- {note}" for note in notes), step)
