"""The scores of one set of samples against the reference, from the features of both."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from evalkit.comparison.advice import warnings_of
from evalkit.comparison.nearest import find_nearest
from evalkit.comparison.pairs import Measured
from evalkit.comparison.plan import Choice, Plan, with_inputs
from evalkit.comparison.precision_check import check_scores
from evalkit.comparison.sources import Side, file_outputs
from evalkit.deviations import Deviations
from evalkit.errors import UndefinedMetricError
from evalkit.extractors.base import Extractor
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import Metric, influence_of, with_error_bars
from evalkit.results import Comparison, Score
from evalkit.system.devices import resolve_device
from evalkit.system.run import Run, library_versions

__all__ = ["Clock", "measure_side"]

NOT_KEPT = (
    "only sums over the features were kept, in constant memory; it needs the features of every image: "
    "also request a metric that needs them, such as precision_recall or inception_score, and no subset"
)
"""Why there is no error bar."""


def measure_side(
    choice: Choice,
    sides: Sequence[Side],
    features: list[BatchFeatures],
    error_bars: bool,
    clock: Clock,
    nearest: int = 0,
) -> Measured:
    """One set of samples against the reference; rows are dropped from ``features`` on the way."""
    plan, extractors, run = sides[1].plan, sides[1].extractors, sides[1].run
    sources = [side.source for side in sides]
    batches = [side.batch(found) for side, found in zip(sides, features, strict=True)]
    warnings = tuple(warnings_of(choice, sources, features, batches, extractors))
    described = _describe(extractors, features)

    algebra = replace(run, device=_algebra_device(run, extractors))
    closest = {}
    if nearest:
        with clock.stage("closest pairs"):
            closest = find_nearest(nearest, plan.metrics, features, algebra)
    streamed = sides[1].moments if error_bars else None
    of_files = [file_outputs(source) for source in sources]
    scores, missing, deviations = _compute(plan, features, algebra, clock, streamed, of_files)
    with clock.stage("precision check"):
        checked = check_scores(sources, extractors, plan.metrics, algebra)
    comparison = Comparison(
        specs=choice.specs,
        scores=tuple(scores),
        missing={**choice.missing, **missing},
        protocol=choice.protocol.name,
        reference=batches[0],
        samples=batches[1],
        extractors=described,
        byte_rules=choice.byte_rules,
        warnings=warnings,
        precision_check=checked,
        closest=closest,
        versions=library_versions(),
        seconds=clock.seconds,
    )
    return Measured(comparison=comparison, deviations=deviations)


def _compute(
    plan: Plan,
    features: list[BatchFeatures],
    run: Run,
    clock: Clock,
    streamed: frozenset[str] | None,
    of_files: Sequence[Collection[str]],
) -> tuple[list[Score], dict[str, str], dict[str, Deviations]]:
    """Compute scores and their deviations; also, by name, why scores are missing.

    Args:
        plan: The metrics to compute.
        features: Features of reference and samples. Rows are removed when no later metric needs them.
        run: Device and progress.
        clock: Measures the time of each stage.
        streamed: Outputs of the samples that have only sums, and no rows; None for no error bars.
        of_files: Outputs whose mean and covariance are in the files of reference and samples.
    """
    scores: list[Score] = []
    missing: dict[str, str] = {}
    deviations: dict[str, Deviations] = {}
    for index, metric in enumerate(plan.metrics):
        names = [spec.name for spec in metric.scores]
        # Rows that no later metric reads need not stay: at 50,000 images, 0.4 GB a side and output.
        needed = {output for later in plan.metrics[index:] for output in later.needs}
        features[:] = [side.select(needed) for side in features]
        try:
            with clock.stage(" and ".join(names)):
                found = metric(features[0], features[1], run)
        except UndefinedMetricError as error:
            missing |= dict.fromkeys(names, str(error))
            continue
        found = with_inputs(found, metric, of_files)
        if streamed is not None:
            bars = _error_bars(found, metric, features, run, clock, streamed)
            found = tuple(with_error_bars(score, bars[score.name]) for score in found)
            deviations |= {
                score.name: bar
                for score in found
                if score.stderr is not None and not isinstance(bar := bars[score.name], str)
            }
        if plan.subset and "rows" in metric.needs.values():
            found = tuple(replace(score, parameters=plan.subset.noted(score.parameters)) for score in found)
        scores += found
    return scores, missing, deviations


def _error_bars(
    scores: Sequence[Score],
    metric: Metric,
    features: Sequence[BatchFeatures],
    run: Run,
    clock: Clock,
    streamed: frozenset[str],
) -> dict[str, Deviations | str]:
    """How the scores of a metric deviate, or why that is not known, by name."""
    if any(need == "gaussian" and output in streamed for output, need in metric.needs.items()):
        return {score.name: NOT_KEPT for score in scores}
    stage = f"error bars of {' and '.join(score.name for score in scores)}"
    report = run.report(stage)
    report(0, 1)
    with clock.stage(stage):
        found = influence_of(metric, features[0], features[1], run)
    report(1, 1)
    return found


def _algebra_device(run: Run, extractors: Mapping[str, Extractor]) -> str:
    """Where distances are computed: beside the network, but not on MPS, which has no float64."""
    beside = (getattr(extractor, "device", None) for extractor in extractors.values())
    device = next((str(device) for device in beside if device), None) or str(resolve_device(run.device))
    return device if device.startswith("cuda") else "cpu"


def _describe(
    extractors: Mapping[str, Extractor], features: Sequence[BatchFeatures]
) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    # What another tool extracted has no fingerprint, and says nothing of the other side.
    ours = {key: kept for side in features[::-1] for key, kept in side.networks.items() if kept.fingerprint}
    for network, found in {**features[1].networks, **features[0].networks, **ours}.items():
        described[network] = {"name": found.extractor, "fingerprint": found.fingerprint}
        extractor = extractors.get(network)
        for name in ("backend", "precision", "device", "preprocess", "weights_record"):
            if hasattr(extractor, name):
                described[network][name.removesuffix("_record")] = getattr(extractor, name)
    return described


@dataclass
class Clock:
    """Wall seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            self.seconds[name] = round(seconds, 3)
