"""The main job: how good are these samples, measured against this reference?"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, TypedDict, Unpack, overload

from evalkit.comparison.advice import check_enough_images, memory_needed, warnings_of
from evalkit.comparison.pairs import (
    Measured,
    check_paired,
    pairs_of_sets,
    pairs_of_settings,
    sets_of,
    settings_of,
)
from evalkit.comparison.plan import Choice, Plan, Subset, as_subset, choose_metrics, make_plan
from evalkit.comparison.precision_check import check_scores
from evalkit.comparison.sources import (
    Opened,
    Side,
    Source,
    check_fingerprints,
    check_networks,
    has_full_rank,
    make_extractors,
    open_source,
    open_sources,
)
from evalkit.deviations import Deviations
from evalkit.errors import UndefinedMetricError, brief
from evalkit.extractors import make_extractor
from evalkit.extractors.base import Extractor
from evalkit.features.extraction import outputs_of
from evalkit.features.record import BatchFeatures, Features
from evalkit.images import ImageSource, ValueRange
from evalkit.metrics.base import Metric, influence_of, with_error_bars
from evalkit.results import Comparison, Score
from evalkit.several import Comparisons
from evalkit.system.devices import prepare_forked_process, resolve_device
from evalkit.system.engine import Engine
from evalkit.system.progress import Progress
from evalkit.system.run import Run, library_versions

__all__ = [
    "Clock",
    "Measured",
    "Source",
    "Subset",
    "compare",
    "features_of",
    "measure",
    "measure_side",
    "open_source",
]

log = logging.getLogger(__name__)

NOT_KEPT = (
    "only sums over the features were kept, in constant memory; it needs the features of every image: "
    "request precision and recall as well, and no subset"
)
"""Why there is no error bar."""


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`compare`, for the type checker; a run's fields among them."""

    protocol: str
    metrics: Collection[str | Metric] | str | Metric | None
    subset: Subset | int | None
    value_range: ValueRange | None
    extractor: Extractor | Sequence[Extractor] | None
    error_bars: bool
    paired: bool | None
    run: Run | None
    device: str
    store: str | PathLike[str] | None
    progress: Progress | None
    engine: Engine


@overload
def compare(reference: Source, samples: Source, /, **options: Unpack[Options]) -> Comparison: ...
@overload
def compare(
    reference: Source,
    *samples: Source,
    runs: Sequence[Sequence[Source]] = ...,
    **options: Unpack[Options],
) -> Comparisons: ...
def compare(
    reference: Source,
    *samples: Source,
    runs: Sequence[Sequence[Source]] = (),
    protocol: str = "adm",
    metrics: Collection[str | Metric] | str | Metric | None = None,
    subset: Subset | int | None = None,
    value_range: ValueRange | None = None,
    extractor: Extractor | Sequence[Extractor] | None = None,
    error_bars: bool = True,
    paired: bool | None = None,
    run: Run | None = None,
    **how: Any,
) -> Comparison | Comparisons:
    """FID, sFID, Inception Score, precision and recall of ``samples`` against ``reference``, and any others.

    With a subset, or if only Fréchet distances are requested, means and covariances are summed up in float64
    while features stream past: memory does not grow with the number of images. With no more images than
    features, which makes covariances singular, features are kept instead: faster, and no digit is lost.

    Args:
        reference: Images (npz, folder, zip, tar, HDF5, array; several files by a pattern), features, or
            statistics (an npz with ``mu, sigma, mu_s, sigma_s``, which replace those of its images, as in
            the published references).
        *samples: Likewise; several sets are compared with each other, too.
        runs: In place of ``samples``: several settings, each with its runs (trainings, seeds or checkpoints).
            Then settings are compared, by how much their runs vary.
        protocol: A row of :data:`evalkit.protocols.PROTOCOLS`. ``adm`` is the ADM reference evaluator's
            arithmetic, float16 distances included; ``exact`` the same metrics in exact arithmetic. Several
            with commas between, such as ``adm,clean-fid``, share one pass over the images.
        metrics: What to compute: names of scores, rows of :data:`evalkit.metrics.METRICS`, ``row@network``,
            or metrics themselves; names also separated by commas. None for all of the protocol. Precision and
            recall come together.
        subset: Of which images features are kept, or of how many; None for all. FID and sFID are of all in
            any case.
        value_range: What files and arrays of floats hold: ``"0..1"``, ``"-1..1"`` or ``"0..255"``; see
            :func:`evalkit.images.open_images`.
        extractor: The network, or one for each network that is needed; None: each with its defaults.
        error_bars: Whether each score comes with its standard error and its value for infinitely many images,
            or the reason why not. They change no score. With one set of samples no more features
            are kept for them; with several those of every image, so that differences can be tested.
        paired: Whether images of the same index in two sets are of the same noise and class; None: where the
            files of `evalkit sample` say so. Pairs have smaller errors.
        run: Device, store, progress and engine.
        **how: Fields of a run, in place of ``run=``: ``store="folder"``, ``progress=print``.

    Returns:
        The scores, and the record of how they were obtained. Of several sets also which of them differ.

    Raises:
        EvalkitError: Bad input, no weights, nothing to compute; see :mod:`evalkit.errors`.
    """
    prepare_forked_process()
    run, choice, subset = Run.of(run, how), choose_metrics(protocol, metrics), as_subset(subset)
    every, groups = sets_of(samples, runs, paired)
    # Opening makes the cheap checks of all sides before the long work on any.
    sources = open_sources(reference, *every, value_range=value_range)
    if paired:
        check_paired(sources[1:])
    measured = measure(
        sources,
        choice,
        subset=subset,
        extractor=extractor,
        error_bars=error_bars,
        # Without features of every image no difference in FID could be tested.
        keep_rows=error_bars and subset is None and len(every) > 1,
        run=run,
    )
    comparisons = tuple(each.comparison for each in measured)
    if groups:
        pairs, settings = pairs_of_settings(comparisons, groups), settings_of(comparisons, groups)
        return Comparisons(comparisons=comparisons, pairs=pairs, settings=settings)
    if len(measured) == 1:
        return comparisons[0]
    return Comparisons(comparisons=comparisons, pairs=pairs_of_sets(measured, sources[1:], paired))


def measure(
    sources: Sequence[Opened],
    choice: Choice,
    *,
    subset: Subset | None = None,
    extractor: Extractor | Sequence[Extractor] | None = None,
    error_bars: bool = True,
    keep_rows: bool = False,
    run: Run,
) -> list[Measured]:
    """What :func:`compare` computes, and how the scores deviate, which no record holds.

    Args:
        sources: The reference, and the sets of samples.
        choice: Which metrics.
        subset: See :func:`compare`, also for the others.
        extractor: Likewise.
        error_bars: Likewise.
        keep_rows: Whether to keep the features of every image where sums would do, for error bars of FID.
        run: Likewise.

    Returns:
        One for each set of samples.
    """
    clock = Clock()
    for source in sources:
        check_enough_images(source, choice.protocol.published_images)
    check_networks(sources, choice.networks)
    extractors = make_extractors(choice.networks, extractor, sources, run)
    check_fingerprints(sources, extractors)
    plan = make_plan(
        choice.metrics,
        subset=subset,
        is_streaming_better=lambda outputs: not keep_rows and has_full_rank(sources, extractors, outputs),
    )
    reference, *others = [Side(source, plan, extractors, run) for source in sources]
    largest = max(others, key=lambda side: side.kept)
    if text := memory_needed([reference, largest], plan, error_bars=error_bars):
        log.info(text)

    with clock.stage("features of reference"):
        kept = [reference.features()]
    found = []
    for side in others:
        spent = replace(clock, seconds=dict(clock.seconds))  # the reference's time is in the record of each
        with spent.stage("features of samples"):
            features = [kept[0], side.features()]
        if side is others[-1]:
            kept.clear()  # so that rows can go as soon as no metric needs them
        found.append(measure_side(choice, [reference, side], features, error_bars, spent))
        features.clear()  # before the rows of the next set come
        if len(others) > 1:  # so that an error in a later set does not lose them
            scores = ", ".join(f"{each.name} {each.value:.4f}" for each in found[-1].comparison.scores)
            log.info("%s: %s", brief(side.source.name, 200), scores or "no score")
    return found


def measure_side(
    choice: Choice, sides: Sequence[Side], features: list[BatchFeatures], error_bars: bool, clock: Clock
) -> Measured:
    """One set of samples against the reference; rows are dropped from ``features`` on the way."""
    plan, extractors, run = sides[1].plan, sides[1].extractors, sides[1].run
    sources = [side.source for side in sides]
    batches = [side.batch(found) for side, found in zip(sides, features, strict=True)]
    warnings = tuple(warnings_of(choice, sources, features, batches))
    described = _describe(extractors, features)

    algebra = replace(run, device=_algebra_device(run, extractors))
    streamed = sides[1].moments if error_bars else None
    scores, missing, deviations = _compute(plan, features, algebra, clock, streamed)
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
        warnings=warnings,
        precision_check=checked,
        versions=library_versions(),
        seconds=clock.seconds,
    )
    return Measured(comparison=comparison, deviations=deviations)


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
    check_fingerprints([opened], extractors)
    return Side(opened, plan, extractors, run).features().networks[network]


def _compute(
    plan: Plan,
    features: list[BatchFeatures],
    run: Run,
    clock: Clock,
    streamed: frozenset[str] | None,
) -> tuple[list[Score], dict[str, str], dict[str, Deviations]]:
    """What was computed; why the rest was not, by name; and how the scores deviate.

    Args:
        plan: What is computed.
        features: Of reference and samples. Rows are dropped from it when no later metric reads them.
        run: Device and progress.
        clock: Takes the time of each stage.
        streamed: Outputs of the samples of which there are sums alone, and no rows; None for no error bars.
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
