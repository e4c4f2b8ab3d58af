"""An evaluator as a metric of torchmetrics, for code that has a MetricCollection already."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from evalkit.errors import MissingDependencyError
from evalkit.evaluator import Evaluator
from evalkit.integrations import scalars
from evalkit.results import Comparison

__all__ = ["evaluator_metric"]


def evaluator_metric(evaluator: Evaluator, *, prefix: str = "", **arguments: Any) -> Any:
    """A ``torchmetrics.Metric`` whose ``compute`` returns the scores by name, as tensors.

    The evaluator itself merges ranks, so torchmetrics has nothing to synchronise. No score of a single batch
    means anything: ``forward`` adds the images, and returns no score. The whole record is in the attribute
    ``comparison`` after ``compute``. Save the state with ``metric.evaluator.state_dict()``.

    Args:
        evaluator: Gets the images.
        prefix: See :func:`evalkit.integrations.scalars`.
        **arguments: Of ``torchmetrics.Metric``.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
    """
    return _kind()(evaluator, prefix, **arguments)


@cache
def _kind() -> Any:
    """The class; it is made when it is needed, because its base is of torchmetrics."""
    try:
        from torchmetrics import Metric
    except ImportError as error:
        raise MissingDependencyError(
            f"This metric needs torchmetrics, which cannot be imported ({error}): "
            "pip install 'evalkit[torchmetrics]'"
        ) from None

    class EvaluatorMetric(Metric):  # type: ignore[misc]
        """See :func:`evaluator_metric`."""

        is_differentiable = False
        higher_is_better = None
        full_state_update = False

        def __init__(self, evaluator: Evaluator, prefix: str, **arguments: Any) -> None:
            # A rank with a cached score would not wait for one that has none, and both would hang.
            super().__init__(**{"compute_with_cache": False} | arguments)
            self.evaluator = evaluator
            self.comparison: Comparison | None = None
            self._prefix = prefix

        def __reduce__(self) -> tuple[Any, ...]:
            return _blank, (), self.__getstate__()

        def update(self, images: Any, labels: Any = None) -> None:
            self.evaluator.update(images, labels)

        def compute(self) -> dict[str, Tensor]:
            self.comparison = self.evaluator.compute()
            found = scalars(self.comparison, self._prefix)
            return {name: torch.tensor(value, device=self.device) for name, value in found.items()}

        def reset(self) -> None:
            super().reset()
            self.evaluator.reset()

        def forward(self, *arguments: Any, **others: Any) -> dict[str, Tensor]:
            self.update(*arguments, **others)
            return {}

    return EvaluatorMetric


def _blank() -> Any:
    """An instance without attributes, for pickle, which cannot find a class that a function made."""
    return _kind().__new__(_kind())
