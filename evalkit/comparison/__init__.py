"""The main job: how good are these samples, measured against this reference?"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import FeatureError, InputError, UndefinedMetricError, listing
from evalkit.extractors.inception import Inception, prepare_forked_process, resolve_device
from evalkit.features import (
    EXTRACTING,
    Extractor,
    Features,
    FeatureStore,
    Progress,
    check_same_extractor,
    extract,
    fill,
    first_features,
    is_features_file,
)
from evalkit.images import (
    ImageSource,
    SupportsArray,
    ValueRange,
    are_ids,
    check_range_used,
    open_images,
    parse_value_range,
)
from evalkit.metrics import (
    PROTOCOLS,
    FrechetDistance,
    Metric,
    Moments,
    PrecisionRecall,
    Statistics,
    is_rank_deficient,
)
from evalkit.metrics.base import Layer, Spread
from evalkit.results import Batch, Comparison, Score
from evalkit.system.distributed import Team
from evalkit.system.files import cache_directory, expand_user, physical_memory, versions

__all__ = [
    "Source",
    "Subset",
    "compare",
    "default_store",
    "feature_drift",
    "features_of",
    "open_source",
    "statistics_of",
    "statistics_record",
]

Source = str | PathLike[str] | SupportsArray | ImageSource | Features
"""A path to images, statistics or features; an array of images; or either of these already open."""

PUBLISHED_IMAGES = 50_000
DRIFT_IMAGES = 128

LAYERS: tuple[Layer, ...] = ("pool", "spatial", "logits")
WIDTHS: dict[Layer, int] = {"pool": 2048, "spatial": 2023, "logits": 1008}
NEIGHBOUR_BYTES = 8
"""A feature, for precision and recall; measured: 3.5 to 5.6, more where bfloat16 does not suffice."""
WORTH_SAYING = 5e8

NOT_ASKED = "not asked for"
OF_RANK_0 = "rank 0 of the team computes it"
HEAD_MISSING = "the weights have no classifier head; this fetches it: evalkit weights --fetch"


def default_store() -> FeatureStore:
    """The store in the user's cache folder (``EVALKIT_CACHE`` moves it)."""
    return FeatureStore(cache_directory() / "features")


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

    def rows(self, n: int) -> NDArray[np.int64]:
        """(images,) indices of those drawn among ``n``, ascending."""
        # RandomState, because NumPy promises that its numbers never change.
        return np.sort(np.random.RandomState(self.seed).permutation(n)[: self.images]).astype(np.int64)


def compare(
    reference: Source,
    samples: Source,
    *,
    protocol: str = "adm",
    metrics: Collection[str] | str | None = None,
    subset: Subset | int | None = None,
    value_range: ValueRange | None = None,
    extractor: Extractor | None = None,
    store: FeatureStore | str | PathLike[str] | None = "default",
    progress: Progress | None = None,
    say: Callable[[str], object] | None = None,
    team: Team | None = None,
) -> Comparison:
    """FID, sFID, Inception Score, precision and recall of ``samples`` against ``reference``.

    With a subset, and where FID and sFID alone are asked for, means and covariances are summed up in float64
    while features stream past: memory does not grow with the number of images. Of no more images than there
    are features, which make covariances singular, features are kept instead: faster, and no digit is lost.

    Args:
        reference: Images (npz, folder, zip, tar, HDF5, array; several files by a pattern), features, or
            statistics (an npz with ``mu, sigma, mu_s, sigma_s``, which replace those of its images, as in
            the published references).
        samples: Likewise.
        protocol: ``adm`` is the ADM reference evaluator's arithmetic, float16 distances included; ``exact``
            the same metrics in exact arithmetic.
        metrics: Names of the scores to compute, as a list or separated by commas; None for all. Precision and
            recall come together.
        subset: Which images the Inception Score, precision and recall are of, or how many; None for all. FID
            and sFID are of all in any case.
        value_range: What files and arrays of floats hold: ``"0..1"``, ``"-1..1"`` or ``"0..255"``; see
            :func:`evalkit.images.open_images`.
        extractor: The network; :class:`~evalkit.extractors.inception.Inception` with its defaults if None.
        store: Where features are kept between runs: a store or its folder; None keeps them nowhere.
        progress: Called with (stage, done, total).
        say: Told, before the work, how much memory it takes, where that is much.
        team: Processes that do this together, each with the same arguments. Rank 0 gets all scores, the
            others those that they help with.

    Returns:
        The scores, and the record of how they were obtained.

    Raises:
        EvalkitError: Bad input, no weights, nothing to compute; see :mod:`evalkit.errors`.
    """
    prepare_forked_process()
    for name, function in (("progress", progress), ("say", say)):
        if function is not None and not callable(function):
            raise InputError(f"{name}={function!r}: expected a function, or None.")
    if not isinstance(subset, Subset | None):
        if isinstance(subset, bool) or not hasattr(subset, "__index__"):
            raise InputError(
                f"subset={subset!r}: expected a number of images, or evalkit.Subset(images=...)."
            )
        subset = Subset(images=subset)
    plan = _plan(protocol, metrics, subset, leads=team is None or team.rank == 0)
    clock = _Clock()
    store = _opened_store(store)
    _check_extractor(extractor)
    if team:
        progress = team.noting(progress)

    # Opening makes the cheap checks of both sides before the long work on either.
    sources = _open_all(reference, samples, value_range=value_range)
    for source in sources:
        _check_enough(source)
    if extractor is None and any(isinstance(source, ImageSource) for source in sources):
        extractor = Inception()
    widths = extractor.dimensions if extractor else WIDTHS
    if not any(
        source.statistics or len(source) > min(widths["pool"], widths["spatial"]) for source in sources
    ):
        plan = _plan(protocol, metrics, subset, leads=plan.leads, streaming=False)
    sides = [_Side(source, plan, extractor, store, progress, team) for source in sources]
    if say and (cost := _memory(sides, plan)):
        say(cost)
    stages = "features of reference", "features of samples"
    for stage, side in zip(stages, sides, strict=True):
        with clock.stage(stage):
            side.help()
    results = []
    for stage, side in zip(stages, sides, strict=True):
        with clock.stage(stage):
            results.append(side.features())
    batches = [side.batch(features) for side, features in zip(sides, results, strict=True)]
    check_same_extractor(*results)
    warnings = tuple(_warnings(sources, results, batches))
    described = _describe(extractor, results[0])

    scores, missing = _scores(plan, results, extractor, clock, progress, team)
    drift: dict[str, Any] = {}
    if plan.leads and isinstance(extractor, Inception) and extractor.precision != "float32":
        with clock.stage("drift"):
            drift = _drift(sources, extractor, plan.metrics, store)
    return Comparison(
        scores=tuple(scores),
        missing=missing,
        protocol=protocol,
        reference=batches[0],
        samples=batches[1],
        extractor=described,
        warnings=warnings,
        drift=drift,
        versions=_versions(),
        seconds=clock.seconds,
    )


def features_of(
    source: Source,
    *,
    layers: Collection[Layer] = LAYERS,
    moments: Collection[Layer] = (),
    value_range: ValueRange | None = None,
    extractor: Extractor | None = None,
    store: FeatureStore | str | PathLike[str] | None = "default",
    progress: Progress | None = None,
    team: Team | None = None,
) -> Features:
    """Features of one batch, from a features file, the store or the network.

    Arguments are as in `compare`, and as in :func:`evalkit.features.extract`. With a team, rank 0 gets the
    features; the others only help.
    """
    (opened,) = _open_all(source, value_range=value_range)
    _check_extractor(extractor)
    if extractor is None and isinstance(opened, ImageSource):
        extractor = Inception()
    store = _opened_store(store)
    leads = team is None or team.rank == 0
    plan = _Plan(layers=layers, own_layers=layers if leads else (), moments=moments, leads=leads)
    side = _Side(opened, plan, extractor, store, team.noting(progress) if team else progress, team)
    side.help()
    return side.features()


def statistics_of(features: Features) -> dict[str, Any]:
    """The arrays of a statistics npz: ``mu`` (d,), ``sigma`` (d, d), ``mu_s``, ``sigma_s``.

    Those that are computed are float64.

    Raises:
        UndefinedMetricError: Fewer than two images.
    """
    arrays: dict[str, Any] = {}
    for layer, suffix in (("pool", ""), ("spatial", "_s")):
        if layer in features.statistics:
            mu, sigma = features.statistics[layer].mu, features.statistics[layer].sigma
        elif (rows := getattr(features, layer)) is None:
            continue  # a file of one pair of statistics, without images
        else:
            moments = Moments(rows.shape[1])
            moments.update(rows)
            mu, sigma = moments.mean, moments.covariance
        arrays |= {f"mu{suffix}": mu, f"sigma{suffix}": sigma}
    return arrays


def statistics_record(features: Features) -> dict[str, Any]:
    """What an npz of :func:`statistics_of` says of itself, under ``provenance``."""
    return {
        "format": "evalkit statistics 1",
        "source": {"name": Path(features.name).name, "digest": features.digest},
        "statistics": {
            "images": len(features),
            "extractor": features.extractor,
            "fingerprint": features.fingerprint,
        },
        "versions": _versions(),
    }


def open_source(source: Source, value_range: ValueRange | None = None) -> ImageSource | Features:
    """Open images or features, with the cheap checks; what is already open stays as it is.

    Args:
        source: What to open.
        value_range: Of floats; see :func:`evalkit.images.open_images`.

    Raises:
        InputError: There is nothing at the path, or not what evalkit reads.
    """
    if isinstance(source, ImageSource) and value_range is not None and source.dtype == np.float32:
        again = parse_value_range(value_range)
        if again != source.value_range:
            raise InputError(
                f"{source.name} is open already, with the value range {source.value_range}; {value_range!r} "
                "must be given when it is opened."
            )
    if isinstance(source, Features | ImageSource):
        return source
    if isinstance(source, str | PathLike) and is_features_file(Path(source)):
        return replace(Features.load(Path(source)), name=str(source))
    return open_images(source, value_range=value_range)


def _open_all(*sources: Source, value_range: ValueRange | None) -> list[ImageSource | Features]:
    opened = [open_source(source, value_range) for source in sources]
    check_range_used(opened, value_range)
    return opened


def _opened_store(store: FeatureStore | str | PathLike[str] | None) -> FeatureStore | None:
    if store is None or isinstance(store, FeatureStore):
        return store
    if store == "default":
        return default_store()
    if not isinstance(store, str | PathLike) or not os.fspath(store):
        raise InputError(f"store={store!r}: expected a folder, evalkit.FeatureStore(folder) or None.")
    return FeatureStore(expand_user(store))


def _check_extractor(extractor: object) -> None:
    is_network = callable(extractor) and hasattr(extractor, "fingerprint") and not isinstance(extractor, type)
    if extractor is not None and not is_network:
        raise InputError(
            f'extractor={extractor!r}: expected a network, such as evalkit.Inception(device="cuda").'
        )


def _names(metrics: Collection[str] | str | None) -> list[str] | None:
    """What was asked for, however it was written."""
    if metrics is None:
        return None
    if isinstance(metrics, str):
        return [name.strip() for name in metrics.split(",")]
    if not isinstance(metrics, Collection) or not all(isinstance(name, str) for name in metrics):
        raise InputError(f'metrics={metrics!r}: expected names, such as ["fid", "recall"] or "fid,recall".')
    return list(metrics)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is computed, by whom, and of what.

    Attributes:
        metrics: In order.
        missing: Names of scores that are not asked for.
        layers: Of which all processes together need features in memory.
        own_layers: Of which this process does.
        moments: Layers whose mean and covariance are summed up as features stream past.
        subset: Of which images features are needed in memory.
        leads: Whether this process computes what is not shared.
    """

    metrics: tuple[Metric, ...] = ()
    missing: tuple[str, ...] = ()
    layers: Collection[Layer]
    own_layers: Collection[Layer]
    moments: Collection[Layer]
    subset: Subset | None = None
    leads: bool = True


def _plan(
    protocol: str,
    metrics: Collection[str] | str | None,
    subset: Subset | None,
    *,
    leads: bool,
    streaming: bool = True,
) -> _Plan:
    if not isinstance(protocol, str) or protocol not in PROTOCOLS:
        raise InputError(f"Unknown protocol {protocol!r}. Give one of {', '.join(PROTOCOLS)}.")
    known = [name for metric in PROTOCOLS[protocol] for name in metric.names]
    names = _names(metrics)
    wanted = set(known if names is None else names)
    if not wanted or wanted - set(known):
        given = listing(map(repr, sorted(wanted - set(known)))) or "(none)"
        raise InputError(f"Unknown metrics {given}. Give one or more of {', '.join(known)}.")
    chosen = [metric for metric in PROTOCOLS[protocol] if wanted & set(metric.names)]
    frechet = [metric for metric in chosen if isinstance(metric, FrechetDistance)]
    in_memory = [metric for metric in chosen if metric not in frechet]
    if subset is None and (in_memory or not streaming):
        in_memory, frechet = chosen, []
    computed = {name for metric in chosen for name in metric.names}
    return _Plan(
        metrics=tuple(
            replace(metric, mean_dtype="float64") if metric in frechet else metric for metric in chosen
        ),
        missing=tuple(name for name in known if name not in computed),
        layers={layer for metric in in_memory for layer in metric.layers},
        own_layers={layer for metric in in_memory if leads or metric.shared for layer in metric.layers},
        moments=[metric.layer for metric in frechet],
        subset=subset,
        leads=leads,
    )


def _scores(
    plan: _Plan,
    results: list[Features],
    extractor: Extractor | None,
    clock: _Clock,
    progress: Progress | None,
    team: Team | None,
) -> tuple[list[Score], dict[str, str]]:
    """What was computed; and why the rest was not, by name."""
    scores: list[Score] = []
    missing = dict.fromkeys(plan.missing, NOT_ASKED)
    device = _algebra_device(extractor)
    for index, metric in enumerate(plan.metrics):
        names = " and ".join(metric.names)
        if not (plan.leads or metric.shared):
            missing |= dict.fromkeys(metric.names, OF_RANK_0)
            continue
        # A layer that no later metric reads need not stay: at 50,000 images each is 0.4 GB a side.
        needed = {layer for later in plan.metrics[index:] for layer in later.layers}
        results[:] = [features.keeping(needed) for features in results]
        spread = _spread(team, [metric, plan.subset, *(features.digest for features in results)])
        try:
            with clock.stage(names):
                found = metric(*results, device=device, progress=_report_to(progress, names), spread=spread)
        except UndefinedMetricError as error:
            reason = str(error)
            if "logits" in metric.layers and not len(results[1]):
                reason = (
                    f"{results[1].name} is statistics alone; this needs the images, or features kept of them"
                )
            elif "logits" in metric.layers and extractor is not None:
                reason = HEAD_MISSING
            missing |= dict.fromkeys(metric.names, reason)
            continue
        if plan.subset and not isinstance(metric, FrechetDistance):
            drawn = {"subset": plan.subset.images, "seed": plan.subset.seed}
            found = tuple(replace(score, parameters={**score.parameters, **drawn}) for score in found)
        scores += found
    return scores, missing


def _spread(team: Team | None, identity: list[object]) -> Spread | None:
    """Shares a metric's pieces of work with the team, by way of its files."""
    if team is None:
        return None
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]

    def spread(name: str, count: int, work: Callable[[int], NDArray[Any]]) -> Iterable[NDArray[Any]]:
        results = team.map(f"{name}-{key}", count, lambda index: {"result": work(index)})
        return (result["result"] for result in results)

    return spread


class _Side:
    """One side of a comparison, and how its features come about."""

    def __init__(
        self,
        source: ImageSource | Features,
        plan: _Plan,
        extractor: Extractor | None,
        store: FeatureStore | None,
        progress: Progress | None,
        team: Team | None,
    ):
        self.source = source
        self.rows = plan.subset.rows(len(source)) if plan.subset else None
        # What the file has itself is not computed.
        there = _layers_of_statistics(source)
        self.moments = [layer for layer in plan.moments if layer not in there]
        self.is_needed = bool(len(source)) and bool(plan.layers or self.moments)
        self.kept = 0
        if plan.own_layers:
            self.kept = len(source) if self.rows is None else len(self.rows)
        self._plan = plan
        self._extractor = extractor
        self._store = store
        self._progress = progress
        self._team = team
        self._origin: Literal["extracted", "stored", "file"] = "stored"
        if isinstance(source, Features) or not len(source):
            self._origin = "file"

    def help(self) -> None:
        """Extract for the team what nobody has in hand."""
        if self._team and self.is_needed and isinstance(self.source, ImageSource):
            assert self._extractor is not None
            if self._store is None:
                raise InputError("Several processes share features by way of the store: not without one.")
            fill(self.source, self._extractor, store=self._store, progress=self._watch, team=self._team)

    def features(self) -> Features:
        if isinstance(self.source, Features):
            return self._of_file(self.source)
        assert self._extractor is not None
        return extract(
            self.source,
            self._extractor,
            layers=self._plan.own_layers,
            rows=self.rows,
            moments=self.moments,
            store=self._store,
            progress=self._watch,
            team=self._team,
        )

    def batch(self, features: Features) -> Batch:
        images = len(self.source) if self.is_needed else 0
        of_file = bool(self.source.statistics)
        return Batch(
            name=features.name,
            images=images,
            image_shape=features.image_shape,
            digest=features.digest,
            statistics="file" if of_file else "images",
            statistics_images=_statistics_images(self.source) if of_file else images,
            features=self._origin,
            statistics_digest=self.source.statistics_digest,
        )

    def _watch(self, stage: str, done: int, total: int) -> None:
        if done < total and stage.startswith(EXTRACTING):
            self._origin = "extracted"
        if self._progress:
            self._progress(stage, done, total)

    def _of_file(self, features: Features) -> Features:
        extractor, layers = self._extractor, self._plan.own_layers
        if extractor is not None and features.fingerprint != extractor.fingerprint:
            raise FeatureError(
                f"{features.name} holds features of another extractor ({features.extractor}, "
                f"{features.fingerprint[:12]}) than the one in use ({extractor.name}, "
                f"{extractor.fingerprint[:12]}): weights, preprocessing, precision or backend differ. "
                "Extract it again with `evalkit features`, or choose the settings it was made with."
            )
        statistics = dict(features.statistics)
        for layer in self.moments if self._plan.leads else ():
            if (array := getattr(features, layer)) is not None:
                moments = Moments(array.shape[1])
                moments.update(array)
                statistics[layer] = Statistics(mu=moments.mean, sigma=moments.covariance)
        kept = replace(features, statistics=statistics, count=len(features))
        if self.rows is not None:
            pool, spatial, logits = (
                None if array is None else array[self.rows]
                for array in (kept.pool, kept.spatial, kept.logits)
            )
            kept = replace(kept, pool=pool, spatial=spatial, logits=logits)
        if "logits" in layers and kept.logits is None and kept.pool is not None and extractor is not None:
            kept = replace(kept, logits=extractor.logits(kept.pool))
        return kept.keeping(layers)


def _memory(sides: list[_Side], plan: _Plan) -> str | None:
    """What the features and the hungriest metric will need, in words; None where that is little."""
    rows = sum(side.kept for side in sides)
    features = 4 * rows * sum(WIDTHS[layer] for layer in plan.own_layers)
    neighbours = any(isinstance(metric, PrecisionRecall) for metric in plan.metrics)
    more = NEIGHBOUR_BYTES * rows * WIDTHS["pool"] if neighbours else 0
    if features + more < WORTH_SAYING:
        return None
    text = f"Memory: {_bytes(features)} for the features of {rows:,} images"
    if more:
        text += f", and up to {_bytes(more)} more for precision and recall"
    there = physical_memory()
    if there is not None and features + more > there:
        text += (
            f". This machine has {_bytes(there)}: take a subset (--subset 50000), or FID and sFID alone "
            "(--metrics fid,sfid), which need none of this"
        )
    return f"{text}."


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _layers_of_statistics(side: ImageSource | Features) -> set[str]:
    """Of which layers a file has mean and covariance."""
    if isinstance(side, Features):
        return set(side.statistics)
    layers = {"mu": "pool", "mu_s": "spatial"}
    return {layer for key, layer in layers.items() if key in (side.statistics or {})}


def _statistics_record(side: ImageSource | Features) -> Mapping[str, Any]:
    """What the file says of its statistics, where evalkit wrote it."""
    record = (isinstance(side, ImageSource) and side.provenance) or {}
    statistics = record.get("statistics")
    return statistics if isinstance(statistics, Mapping) else {}


def _statistics_images(side: ImageSource | Features) -> int | None:
    count = _statistics_record(side).get("images")
    return count if isinstance(count, int) else None


def _check_enough(side: ImageSource | Features) -> None:
    if len(side) == 1 and not side.statistics:
        raise UndefinedMetricError(
            f"{side.name} holds one image; no metric of a batch is defined for it. Give at least 4 images, "
            f"and {PUBLISHED_IMAGES:,} for published numbers."
        )


def _warnings(
    sides: list[ImageSource | Features], results: list[Features], batches: list[Batch]
) -> Iterator[str]:
    reference, samples = results
    if batches[1].statistics == "file":
        yield (
            f"{samples.name} was given as samples and carries mu and sigma: FID and sFID use these, not its "
            "images, as the reference evaluator does. If it is a reference batch, its FID is near 0."
        )
    if batches[0].digest == batches[1].digest and batches[0].images:
        yield "Reference and samples are the same images: precision and recall are 1 by construction."
    if 0 < batches[1].images < PUBLISHED_IMAGES:
        yield (
            f"{samples.name} holds {len(samples):,} images; published numbers use {PUBLISHED_IMAGES:,}. "
            "Fewer images raise FID and sFID: compare only with numbers of the same N."
        )
    singular = [batch for batch, of in zip(batches, results, strict=True) if _is_singular(batch, of)]
    if singular:
        names = " and ".join(f"{batch.name} ({batch.images:,} images)" for batch in singular)
        yield (
            f"More features than images, so singular covariances, in {names}: FID and sFID are exact for "
            "these images and say little about their distribution. Use more than 2,048 images, better 10,000."
        )
    if reference.image_shape and samples.image_shape and reference.image_shape != samples.image_shape:
        yield (
            f"Image sizes differ: {_size(reference)} and {_size(samples)}. Both are resized to 299x299; "
            "published references have the size of the samples."
        )
    for side, features in zip(sides, results, strict=True):
        made_by = _statistics_record(side).get("fingerprint")
        if side.statistics and made_by not in (None, features.fingerprint):
            yield (
                f"The statistics in {features.name} are of another extractor than the one in use (weights, "
                "precision or backend differ): FID and sFID mix the two."
            )
        yield from _label_warning(features)
    for side in sides:
        if isinstance(side, ImageSource):
            yield from side.notes


def _is_singular(batch: Batch, features: Features) -> bool:
    """Whether the covariance of its images' pool features is."""
    if batch.statistics == "file":
        return False
    if features.pool is not None:
        return is_rank_deficient(batch.images, features.pool.shape[1])
    return "pool" in features.statistics and is_rank_deficient(
        batch.images, features.statistics["pool"].mu.size
    )


def _label_warning(features: Features) -> Iterator[str]:
    """Labels drawn uniformly spread like a Poisson variable; far beyond that they were not."""
    if features.labels is None or not len(features.labels):
        return
    _, counts = np.unique(features.labels, return_counts=True)
    if are_ids(features.labels):
        yield (
            f"The labels of {features.name} are {len(counts):,} different numbers up to "
            f"{features.labels.max()} "
            f"for {len(features.labels):,} images. They look like seeds or ids, not classes. No metric here "
            "uses them."
        )
        return
    expected = counts.mean()
    if len(counts) > 1 and np.abs(counts - expected).max() > max(6 * np.sqrt(expected), 2):
        yield (
            f"The labels of {features.name} are far from uniform: {len(counts)} classes of {counts.min()} to "
            f"{counts.max()} images. Published numbers use labels drawn uniformly."
        )


def _size(features: Features) -> str:
    assert features.image_shape is not None
    return f"{features.image_shape[1]}x{features.image_shape[0]}"


def _drift(
    sides: list[ImageSource | Features],
    extractor: Inception,
    metrics: Iterable[Metric],
    store: FeatureStore | None,
) -> dict[str, Any]:
    """What the reduced precision moves each score by, measured on the first images of both batches."""
    images = [side for side in sides if isinstance(side, ImageSource) and len(side) > 3]
    if len(images) < len(sides):
        return {}
    drift: dict[str, Any] = {"images": [min(len(side), DRIFT_IMAGES) for side in images]}
    for candidate in (extractor.at_precision("float32"), extractor):
        features = [first_features(side, candidate, DRIFT_IMAGES, store=store) for side in images]
        drift[candidate.precision] = {
            score.name: score.value
            for metric in metrics
            if not (metric.names == ("inception_score",) and features[1].logits is None)
            for score in metric(*features, device=_algebra_device(extractor))
        }
    return drift


def feature_drift(
    images: Source, extractor: Extractor, *, store: FeatureStore | None = None
) -> tuple[int, dict[str, float]]:
    """How far a reduced precision moves the features of the first images of a batch.

    Args:
        images: The batch; where it is features already, nothing is looked at.
        extractor: Of which precision.
        store: Where features are read, if it has them.

    Returns:
        How many images were looked at, 0 where the precision is not reduced; and by layer, the root mean
        square of the difference from float32 as a share of that of the float32 features.

    Raises:
        InputError: The images are bad.
    """
    if not isinstance(extractor, Inception) or extractor.precision == "float32":
        return 0, {}
    images = open_source(images)
    if not isinstance(images, ImageSource) or not len(images):
        return 0, {}
    exact, reduced = (
        first_features(images, candidate, DRIFT_IMAGES, store=store)
        for candidate in (extractor.at_precision("float32"), extractor)
    )
    norm = np.linalg.norm
    return len(exact), {
        layer: float(norm(getattr(reduced, layer) - getattr(exact, layer)) / norm(getattr(exact, layer)))
        for layer in ("pool", "spatial")
    }


def _algebra_device(extractor: Extractor | None) -> str:
    """Where distances are computed: beside the network, but not on MPS, which has no float64."""
    device = extractor.device if isinstance(extractor, Inception) else str(resolve_device("auto"))
    return "cpu" if device.startswith("mps") else device


def _report_to(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(stage, done, total)


def _describe(extractor: Extractor | None, features: Features) -> dict[str, Any]:
    described: dict[str, Any] = {"name": features.extractor, "fingerprint": features.fingerprint}
    for name in ("backend", "precision", "device"):
        if hasattr(extractor, name):
            described[name] = getattr(extractor, name)
    weights = getattr(extractor, "weights", None)
    if weights is not None:
        described["weights"] = {
            "source": weights.source,
            "container": weights.container,
            "digest": weights.digest,
            "genuine": weights.genuine,
            "head_digest": weights.head_digest,
            "head_genuine": weights.head_genuine,
        }
    return described


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **versions("evalkit", "torch", "numpy", "scipy", "tensorflow"),
    }


class _Clock:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            self.seconds[name] = round(seconds, 3)
