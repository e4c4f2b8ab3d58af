"""Decides what to compute: which metrics, which outputs as rows or as Gaussians, on which images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError
from evalkit.features.record import split_output
from evalkit.metrics import named
from evalkit.metrics.base import Metric
from evalkit.protocols import protocol_named
from evalkit.protocols.base import Protocol
from evalkit.results import NOT_REQUESTED, Score, ScoreSpec

__all__ = ["Choice", "Plan", "Subset", "as_subset", "choose_metrics", "make_plan", "with_inputs"]


@dataclass(frozen=True, kw_only=True)
class Subset:
    """A choice of images, for the metrics that need the features of all in memory.

    Attributes:
        images: How many to draw of each side, without replacement; a side with fewer is taken whole.
        seed: Random seed. Those drawn are the first of ``numpy.random.RandomState(seed).permutation(n)``.
    """

    images: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise InputError(f"Subset({name}={value!r}): expected a whole number.")
            object.__setattr__(self, name, int(value))  # NumPy's cannot be written as JSON
        if self.images < 1:
            raise InputError(f"A subset of {self.images} images: expected at least 1, better 10,000.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"Seed {self.seed}: expected 0 to {2**32 - 1}.")

    def noted(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a score of a subset. Its seed has another name beside a seed of the metric."""
        seed = "subset_seed" if "seed" in parameters else "seed"
        return {**parameters, "subset": self.images, seed: self.seed}

    def rows(self, n: int) -> NDArray[np.int64]:
        """(images,) indices of those drawn among ``n``, ascending."""
        # RandomState, because NumPy promises that its numbers never change.
        return np.sort(np.random.RandomState(self.seed).permutation(n)[: self.images]).astype(np.int64)


def as_subset(subset: Subset | int | None) -> Subset | None:
    """A subset of so many images, where a number is given.

    Raises:
        InputError: Neither a subset nor a number.
    """
    if subset is None or isinstance(subset, Subset):
        return subset
    if isinstance(subset, bool) or not hasattr(subset, "__index__"):
        raise InputError(f"subset={subset!r}: expected a number of images, or evalkit.Subset(images=...).")
    return Subset(images=subset)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which metrics are computed.

    Attributes:
        protocol: Of which protocol.
        metrics: In the order of tables.
        missing: By score, why it is not computed.
    """

    protocol: Protocol
    metrics: tuple[Metric, ...]
    missing: Mapping[str, str]

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that are needed, each once."""
        needs = (split_output(output)[0] for metric in self.metrics for output in metric.needs)
        return tuple(dict.fromkeys(needs))

    @property
    def byte_rules(self) -> dict[str, str]:
        """By protocol, what is done to images that are not 8-bit RGB of the right size."""
        names = self.protocol.name.split(",")
        return {name: protocol_named(name).byte_rule for name in names}

    @property
    def specs(self) -> tuple[ScoreSpec, ...]:
        """Every score of the protocol, then those of other metrics."""
        return _specs([*self.protocol.metrics, *self.metrics])


def choose_metrics(protocol: str, metrics: Collection[str | Metric] | str | Metric | None = None) -> Choice:
    """The metrics of a protocol, or those of them that are requested, and any others.

    Args:
        protocol: A row of :data:`evalkit.protocols.PROTOCOLS`, or several with commas between.
        metrics: Names of scores and metrics themselves, in a collection; names also separated by commas. None
            for all of the protocol. Precision and recall come together, and a score of several protocols
            is that of each.

    Raises:
        InputError: An unknown protocol or metric.
    """
    found = protocol_named(protocol)
    asked = list(found.metrics) if metrics is None else _resolved(found, metrics)
    # Those of the protocol in its order, then the others in theirs.
    chosen = [metric for metric in found.metrics if metric in asked]
    chosen += [metric for metric in asked if metric not in chosen]
    names = [spec.name for metric in chosen for spec in metric.scores]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"The scores {', '.join(sorted(twice))} are requested with different parameters.")
    missing = {
        spec.name: NOT_REQUESTED
        for metric in found.metrics
        for spec in metric.scores
        if spec.name not in names
    }
    return Choice(protocol=found, metrics=tuple(chosen), missing=missing)


def _resolved(protocol: Protocol, metrics: Collection[str | Metric] | str | Metric) -> list[Metric]:
    items: list[str | Metric]
    if isinstance(metrics, str):
        items = [name.strip() for name in metrics.split(",")]
    elif isinstance(metrics, Collection):
        items = list(metrics)
    else:
        items = [metrics]
    if not items or not all(
        isinstance(item, str) or (isinstance(item, Metric) and not isinstance(item, type)) for item in items
    ):
        raise InputError(
            f'metrics={metrics!r}: expected names or metrics, such as ["fid", "recall"] or "fid,recall".'
        )
    found = [_named(item, protocol) if isinstance(item, str) else [item] for item in items]
    return list(dict.fromkeys(metric for metrics in found for metric in metrics))


def _named(name: str, protocol: Protocol) -> list[Metric]:
    names = {name, *(f"{name}@{each}" for each in protocol.name.split(","))}
    of_protocol = [metric for metric in protocol.metrics if names & {spec.name for spec in metric.scores}]
    return of_protocol or [named(name, protocol.metrics)]


def _specs(metrics: Sequence[Metric]) -> tuple[ScoreSpec, ...]:
    return tuple({spec.name: spec for metric in metrics for spec in metric.scores}.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is kept of each side, as ``"network:output"``.

    Attributes:
        metrics: In order.
        rows: Outputs of which rows are kept.
        moments: Outputs whose mean and covariance are summed up as features stream past.
        subset: Of which images rows are kept.
    """

    metrics: tuple[Metric, ...]
    rows: frozenset[str]
    moments: frozenset[str]
    subset: Subset | None


def make_plan(
    metrics: Sequence[Metric],
    *,
    subset: Subset | None,
    is_streaming_better: Callable[[Collection[str]], bool],
) -> Plan:
    """Rows where a metric needs them. Else Gaussians, in memory that does not grow with the images.

    Args:
        metrics: What is computed.
        subset: Of which images rows are kept; Gaussians are always of all.
        is_streaming_better: Whether Gaussians of these outputs should be summed up where no rows are needed.
    """
    streamed = [metric for metric in metrics if set(metric.needs.values()) == {"gaussian"}]
    in_memory = [metric for metric in metrics if metric not in streamed]
    outputs = {output for metric in streamed for output in metric.needs}
    if subset is None and (in_memory or not is_streaming_better(outputs)):
        in_memory, streamed = list(metrics), []
    return Plan(
        metrics=tuple(_streamed(metric) if metric in streamed else metric for metric in metrics),
        rows=frozenset(output for metric in in_memory for output in metric.needs),
        moments=frozenset(output for metric in streamed for output in metric.needs),
        subset=subset,
    )


def _streamed(metric: Metric) -> Metric:
    variant: Metric = metric.streamed() if hasattr(metric, "streamed") else metric
    return variant


def with_inputs(
    scores: Sequence[Score], metric: Metric, of_files: Sequence[Collection[str]]
) -> tuple[Score, ...]:
    """The scores of a metric, with the inputs that it used.

    Args:
        scores: The scores as returned by the metric.
        metric: The metric.
        of_files: Outputs whose mean and covariance are in the files of reference and samples.
    """
    found = []
    for score in scores:
        # A metric of several networks says of each score which one it is of.
        one = score.parameters.get("output")
        outputs = (one,) if isinstance(one, str) and one in metric.needs else tuple(metric.needs)
        summed = {output for output in outputs if metric.needs[output] == "gaussian"}
        seen: list[Literal["images", "statistics"]] = [
            "images" if summed.isdisjoint(of_file) else "statistics" for of_file in of_files
        ]
        reference = seen[0] if metric.uses_reference else "nothing"
        found.append(replace(score, outputs=outputs, reference=reference, samples=seen[1]))
    return tuple(found)
