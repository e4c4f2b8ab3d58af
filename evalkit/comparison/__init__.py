"""The main job: how good are these samples, measured against this reference?"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from evalkit.comparison.advice import check_enough_images, memory_needed, warnings_of
from evalkit.comparison.plan import Plan, Subset, as_subset, choose_metrics, make_plan
from evalkit.comparison.precision_check import check_scores
from evalkit.comparison.sources import (
    Opened,
    Side,
    Source,
    check_networks,
    file_outputs,
    make_extractors,
    open_source,
    open_sources,
    widths_of,
)
from evalkit.errors import UndefinedMetricError
from evalkit.extractors import make_extractor
from evalkit.extractors.base import Extractor
from evalkit.features.extraction import outputs_of
from evalkit.features.record import BatchFeatures, Features, check_same_extractor
from evalkit.images import ImageSource, ValueRange
from evalkit.metrics.base import Metric, influence_of, with_error_bars
from evalkit.results import Comparison, Score
from evalkit.system.devices import prepare_forked_process, resolve_device
from evalkit.system.run import Run, library_versions

__all__ = ["Source", "Subset", "compare", "features_of", "open_source"]

log = logging.getLogger(__name__)

NOT_KEPT = (
    "only sums over the features were kept, in constant memory; it needs the features of every image: "
    "request precision and recall as well, and no subset"
)
"""Why there is no error bar."""


def compare(
    reference: Source,
    samples: Source,
    *,
    protocol: str = "adm",
    metrics: Collection[str | Metric] | str | Metric | None = None,
    subset: Subset | int | None = None,
    value_range: ValueRange | None = None,
    extractor: Extractor | Sequence[Extractor] | None = None,
    error_bars: bool = True,
    run: Run | None = None,
    **how: Any,
) -> Comparison:
    """FID, sFID, Inception Score, precision and recall of ``samples`` against ``reference``, and any others.

    With a subset, or if only Fréchet distances are requested, means and covariances are summed up in float64
    while features stream past: memory does not grow with the number of images. With no more images than
    features, which makes covariances singular, features are kept instead: faster, and no digit is lost.

    Args:
        reference: Images (npz, folder, zip, tar, HDF5, array; several files by a pattern), features, or
            statistics (an npz with ``mu, sigma, mu_s, sigma_s``, which replace those of its images, as in
            the published references).
        samples: Likewise.
        protocol: A row of :data:`evalkit.protocols.PROTOCOLS`. ``adm`` is the ADM reference evaluator's
            arithmetic, float16 distances included; ``exact`` the same metrics in exact arithmetic.
        metrics: What to compute: names of scores, rows of :data:`evalkit.metrics.METRICS`, ``row@network``,
            or metrics themselves; names also separated by commas. None for all of the protocol. Precision and
            recall come together.
        subset: Of which images features are kept, or of how many; None for all. FID and sFID are of all in
            any case.
        value_range: What files and arrays of floats hold: ``"0..1"``, ``"-1..1"`` or ``"0..255"``; see
            :func:`evalkit.images.open_images`.
        extractor: The network, or one for each network that is needed; None: each with its defaults.
        error_bars: Whether each score comes with its standard error and its value for infinitely many images,
            or the reason why not. They change no score, and no more features are kept for them.
        run: Device, store, progress and engine.
        **how: Fields of a run, in place of ``run=``: ``store="folder"``, ``progress=print``.

    Returns:
        The scores, and the record of how they were obtained.

    Raises:
        EvalkitError: Bad input, no weights, nothing to compute; see :mod:`evalkit.errors`.
    """
    prepare_forked_process()
    run, clock = Run.of(run, how), _Clock()
    choice, subset = choose_metrics(protocol, metrics), as_subset(subset)

    # Opening makes the cheap checks of both sides before the long work on either.
    sources = open_sources(reference, samples, value_range=value_range)
    for source in sources:
        check_enough_images(source, choice.protocol.published_images)
    check_networks(sources, choice.networks)
    extractors = make_extractors(choice.networks, extractor, sources, run)
    plan = make_plan(
        choice.metrics,
        subset=subset,
        is_streaming_better=lambda outputs: _has_full_rank(sources, extractors, outputs),
    )
    sides = [Side(source, plan, extractors, run) for source in sources]
    if text := memory_needed(sides, plan, error_bars=error_bars):
        log.info(text)

    features = _extract(sides, clock)
    batches = [side.batch(found) for side, found in zip(sides, features, strict=True)]
    for network in features[0].networks.keys() & features[1].networks.keys():
        check_same_extractor(*(found.networks[network] for found in features))
    warnings = tuple(warnings_of(choice, sources, features, batches))
    described = _describe(extractors, features)

    algebra = replace(run, device=_algebra_device(run, extractors))
    streamed = sides[1].moments if error_bars else None
    scores, missing = _compute(plan, features, algebra, clock, streamed)
    with clock.stage("precision check"):
        checked = check_scores(sources, extractors, plan.metrics, algebra)
    return Comparison(
        specs=choice.specs,
        scores=tuple(scores),
        missing={**choice.missing, **missing},
        protocol=protocol,
        reference=batches[0],
        samples=batches[1],
        extractors=described,
        warnings=warnings,
        precision_check=checked,
        versions=library_versions(),
        seconds=clock.seconds,
    )


def features_of(
    source: Source,
    *,
    outputs: Collection[str] | None = None,
    moments: Collection[str] = (),
    value_range: ValueRange | None = None,
    extractor: Extractor | None = None,
    run: Run | None = None,
    **how: Any,
) -> Features:
    """Features of one batch through one network, from a features file, the store or the network.

    Arguments are as in `compare`, and as in :func:`evalkit.features.extraction.extract`.
    """
    run = Run.of(run, how)
    (opened,) = open_sources(source, value_range=value_range)
    if extractor is None and isinstance(opened, ImageSource):
        extractor = make_extractor("inception", device=run.device)
    network = extractor.network if extractor else opened.network  # type: ignore[union-attr]
    if outputs is None:
        outputs = outputs_of(extractor) if extractor else [*opened.arrays]  # type: ignore[union-attr]
    plan = Plan(
        metrics=(),
        rows=frozenset(f"{network}:{output}" for output in outputs),
        moments=frozenset(f"{network}:{output}" for output in moments),
        subset=None,
    )
    extractors = make_extractors([network], extractor, [opened], run)
    (found,) = _extract([Side(opened, plan, extractors, run)], _Clock())
    return found.networks[network]


def _has_full_rank(
    sources: Sequence[Opened], extractors: Mapping[str, Extractor], outputs: Collection[str]
) -> bool:
    """Whether a side has its own Gaussians, or more images than the narrowest of these outputs is wide."""
    known = widths_of(sources, extractors)
    widths = [known[output] for output in outputs if output in known]
    return any(file_outputs(source) or len(source) > min(widths, default=0) for source in sources)


def _extract(sides: Sequence[Side], clock: _Clock) -> list[BatchFeatures]:
    found = []
    for stage, side in zip(("features of reference", "features of samples"), sides, strict=False):
        with clock.stage(stage):
            found.append(side.features())
    return found


def _compute(
    plan: Plan,
    features: list[BatchFeatures],
    run: Run,
    clock: _Clock,
    streamed: frozenset[str] | None,
) -> tuple[list[Score], dict[str, str]]:
    """What was computed; and why the rest was not, by name.

    Args:
        plan: What is computed.
        features: Of reference and samples. Rows are dropped from it when no later metric reads them.
        run: Device and progress.
        clock: Takes the time of each stage.
        streamed: Outputs of the samples of which there are sums alone, and no rows; None for no error bars.
    """
    scores: list[Score] = []
    missing: dict[str, str] = {}
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
        if streamed is not None:
            found = _with_error_bars(found, metric, features, run, clock, streamed)
        if plan.subset and "rows" in metric.needs.values():
            drawn = {"subset": plan.subset.images, "seed": plan.subset.seed}
            found = tuple(replace(score, parameters={**score.parameters, **drawn}) for score in found)
        scores += found
    return scores, missing


def _with_error_bars(
    scores: Sequence[Score],
    metric: Metric,
    features: Sequence[BatchFeatures],
    run: Run,
    clock: _Clock,
    streamed: frozenset[str],
) -> tuple[Score, ...]:
    """The scores of a metric with their standard errors, or with the reason why there are none."""
    if any(need == "gaussian" and output in streamed for output, need in metric.needs.items()):
        return tuple(with_error_bars(score, NOT_KEPT) for score in scores)
    stage = f"error bars of {' and '.join(score.name for score in scores)}"
    report = run.report(stage)
    report(0, 1)
    with clock.stage(stage):
        bars = influence_of(metric, features[0], features[1], run)
    report(1, 1)
    return tuple(with_error_bars(score, bars[score.name]) for score in scores)


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
class _Clock:
    """Wall seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            self.seconds[name] = round(seconds, 3)
