"""What a comparison yields: scores with their parameters, and the record of how they were obtained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Score"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of one metric.

    Attributes:
        name: Field-standard short name: ``"fid"``, ``"sfid"``, ``"inception_score"``, ``"precision"``, ``"recall"``.
        value: The number itself; always finite.
        better: Which direction is better.
        spread: Standard deviation over the metric's own splits, where it has splits.
        parameters: The metric's parameters, so that a report can say how the number was made.
    """

    name: str
    value: float
    better: Literal["lower", "higher"]
    spread: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
