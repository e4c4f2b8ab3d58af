"""Scores within classes as text: which classes are best and worst, and which were left out."""

from __future__ import annotations

from collections.abc import Iterable

from evalkit.results import Score, ScoreSpec

__all__ = ["class_lines", "left_out"]

SHOWN = 5
"""So many of the best classes and of the worst are shown."""


def class_lines(spec: ScoreSpec, score: Score) -> list[str]:
    """The best and the worst classes with their values, and how many were left out; a line each.

    Empty where the score is not of classes.
    """
    if not score.by_class:
        return []
    ranked = sorted(score.by_class.items(), key=lambda each: each[1], reverse=spec.higher_is_better)
    if len(ranked) <= 2 * SHOWN:
        lines = [f"classes, best first: {_listed(spec, ranked)}"]
    else:
        best, worst = _listed(spec, ranked[:SHOWN]), _listed(spec, ranked[: -SHOWN - 1 : -1])
        lines = [f"best of {len(ranked):,} classes: {best}", f"worst: {worst}"]
    text = left_out(score)
    return lines if text is None else [*lines, text]


def left_out(score: Score) -> str | None:
    """How many classes a score leaves out, and why; None where there is none."""
    count = score.parameters.get("left_out") if score.by_class else None
    if not isinstance(count, int) or count < 1:
        return None
    least = score.parameters.get("least_images")
    classes = f"{count:,} class{' is' if count == 1 else 'es are'} left out"
    return f"{classes}, with fewer than {least} images in the reference or the samples"


def _listed(spec: ScoreSpec, classes: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{label} ({spec.format(value)})" for label, value in classes)
