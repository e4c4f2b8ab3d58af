"""The main job: how good are these samples, measured against this reference?"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, TypedDict, Unpack, overload

from evalkit.comparison.advice import check_sources, memory_needed
from evalkit.comparison.networks import check_fingerprints, settle_features
from evalkit.comparison.pairs import (
    Measured,
    check_paired,
    pairs_of_sets,
    pairs_of_settings,
    sets_of,
    settings_of,
)
from evalkit.comparison.plan import (
    Choice,
    Plan,
    Subset,
    as_subset,
    choose_metrics,
    make_plan,
)
from evalkit.comparison.scores import Clock, measure_side
from evalkit.comparison.sources import (
    Opened,
    Side,
    Source,
    has_full_rank,
    hash_ahead,
    make_extractors,
    open_source,
    open_sources,
)
from evalkit.errors import brief
from evalkit.extractors import make_extractor
from evalkit.extractors.base import Extractor
from evalkit.features.extraction import outputs_of
from evalkit.features.record import Features
from evalkit.images import ImageSource, ValueRange
from evalkit.metrics.base import Metric
from evalkit.results import Comparison
from evalkit.several import Comparisons
from evalkit.system.background import Background
from evalkit.system.devices import prepare_forked_process
from evalkit.system.engine import Engine
from evalkit.system.progress import Progress
from evalkit.system.run import Run

__all__ = [
    "Measured",
    "Source",
    "Subset",
    "compare",
    "features_of",
    "measure",
    "open_source",
]

log = logging.getLogger(__name__)


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

    With a subset, or if only Fréchet distances are requested, means and covariances are accumulated in
    float64 as features are computed, so memory does not grow with the number of images. With no more images
    than features, covariances are singular; then features are kept, which is faster and more precise.

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
    nearest: int = 0,
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
        nearest: How many of the closest pairs to find, from rows that are kept.
        run: Likewise.

    Returns:
        One for each set of samples.
    """
    clock = Clock()
    sources = check_sources(sources, choice)
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

    found = []
    with Background() as background:
        hash_ahead(sources, 0, background)  # first, so that with few threads the next one waits for it
        hash_ahead(sources, 1, background)
        with clock.stage("features of reference"):
            kept = [reference.features()]
        for number, side in enumerate(others, 1):
            # Only the next file: reading more would evict this one from the page cache.
            hash_ahead(sources, number + 1, background)
            # Each record includes the reference's time.
            spent = replace(clock, seconds=dict(clock.seconds))
            with spent.stage("features of samples"):
                features = [kept[0], side.features()]
            if side is others[-1]:
                kept.clear()  # so that rows are freed as soon as no metric needs them
            found.append(measure_side(choice, [reference, side], features, error_bars, spent, nearest))
            features.clear()  # free them before extracting the next set
            if len(others) > 1:  # so that an error in a later set does not discard them
                scores = ", ".join(f"{each.name} {each.value:.4f}" for each in found[-1].comparison.scores)
                log.info("%s: %s", brief(side.source.name, 200), scores or "no score")
    return found


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
    """Features of one batch from one network: read from a features file or the store, or extracted.

    Arguments are as in `compare`, and as in :func:`evalkit.features.extraction.extract`.

    Raises:
        InputError: The file has features of a different network.
        EvalkitError: As for `compare`.
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
    (opened,) = settle_features([opened], [network])
    extractors = make_extractors([network], extractor, [opened], run)
    check_fingerprints([opened], extractors)
    return Side(opened, plan, extractors, run).features().networks[network]
