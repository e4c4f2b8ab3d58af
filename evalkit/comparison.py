"""The main job: how good are these samples, measured against this reference?"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.extractors.inception import Inception, resolve_device
from evalkit.features import (
    Extractor,
    Features,
    FeatureStore,
    Progress,
    check_same_extractor,
    extract,
    is_features_file,
)
from evalkit.files import cache_directory
from evalkit.images import ImageSource, SupportsArray, open_images
from evalkit.metrics import PROTOCOLS, Moments, is_rank_deficient
from evalkit.results import Batch, Comparison, Score

__all__ = [
    "Source",
    "compare",
    "default_store",
    "features_of",
    "open_source",
    "statistics_of",
    "statistics_record",
]

Source = str | PathLike[str] | SupportsArray | ImageSource | Features
"""A path to images, statistics or features; an array of images; or either of these already open."""

PUBLISHED_IMAGES = 50_000
DRIFT_IMAGES = 128

HEAD_MISSING = "the weights have no classifier head; this fetches it: evalkit weights --fetch"


def default_store() -> FeatureStore:
    """The store in the user's cache folder (``EVALKIT_CACHE`` moves it)."""
    return FeatureStore(cache_directory() / "features")


def compare(
    reference: Source,
    samples: Source,
    *,
    protocol: str = "adm",
    extractor: Extractor | None = None,
    store: FeatureStore | Literal["default"] | None = "default",
    progress: Progress | None = None,
) -> Comparison:
    """FID, sFID, Inception Score, precision and recall of ``samples`` against ``reference``.

    Args:
        reference: Images (npz, folder, zip, tar, HDF5, array), features, or statistics (an npz with ``mu,
            sigma, mu_s, sigma_s``, which replace those of its images, as in the published references).
        samples: Likewise.
        protocol: ``adm`` is the ADM reference evaluator's arithmetic, float16 distances included; ``exact``
            the same metrics in exact arithmetic.
        extractor: The network; :class:`~evalkit.extractors.inception.Inception` with its defaults if None.
        store: Where features are kept between runs; None keeps them nowhere.
        progress: Called with (stage, done, total).

    Returns:
        The scores, and the record of how they were obtained.

    Raises:
        EvalkitError: Bad input, no weights, nothing to compute; see :mod:`evalkit.errors`.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"Unknown protocol {protocol!r}. Give one of {', '.join(PROTOCOLS)}.")
    clock = _Clock()
    if store == "default":
        store = default_store()

    # Opening makes the cheap checks of both sides before the long work on either.
    sides = [open_source(reference), open_source(samples)]
    for side in sides:
        _check_enough(side)
    if extractor is None and any(isinstance(side, ImageSource) for side in sides):
        extractor = Inception()

    def both() -> Iterator[tuple[Features, Batch]]:
        for role, side in zip(("reference", "samples"), sides, strict=True):
            with clock.stage(f"features of {role}"):
                yield _features(side, extractor, store, progress)

    results, batches = map(list, zip(*both(), strict=True))
    check_same_extractor(*results)

    scores: list[Score] = []
    missing: dict[str, str] = {}
    device = _algebra_device(extractor)
    metrics = PROTOCOLS[protocol]
    for index, metric in enumerate(metrics):
        names = " and ".join(metric.names)
        # A layer that no later metric reads need not stay: at 50,000 images each is 0.4 GB a side.
        needed = {layer for later in metrics[index:] for layer in later.layers}
        results = [features.keeping(needed) for features in results]
        try:
            with clock.stage(names):
                scores += metric(*results, device=device, progress=_report_to(progress, names))
        except UndefinedMetricError as error:
            headless = "logits" in metric.layers and len(results[1]) and extractor is not None
            missing |= dict.fromkeys(metric.names, HEAD_MISSING if headless else str(error))

    drift: dict[str, Any] = {}
    if isinstance(extractor, Inception) and extractor.precision != "float32":
        with clock.stage("drift"):
            drift = _drift(sides, extractor, protocol)
    return Comparison(
        scores=tuple(scores),
        missing=missing,
        protocol=protocol,
        reference=batches[0],
        samples=batches[1],
        extractor=_describe(extractor, results[0]),
        warnings=tuple(_warnings(sides, results, batches)),
        drift=drift,
        versions=_versions(),
        seconds=clock.seconds,
    )


def features_of(
    source: Source,
    *,
    extractor: Extractor | None = None,
    store: FeatureStore | Literal["default"] | None = "default",
    progress: Progress | None = None,
) -> Features:
    """Features of one batch, from a features file, the store or the network; arguments as in `compare`."""
    side = open_source(source)
    if extractor is None and isinstance(side, ImageSource):
        extractor = Inception()
    return _features(side, extractor, default_store() if store == "default" else store, progress)[0]


def statistics_of(features: Features) -> dict[str, Any]:
    """The arrays of a statistics npz: ``mu`` (d,) float32, ``sigma`` (d, d) float64, ``mu_s``, ``sigma_s``.

    Raises:
        UndefinedMetricError: Fewer than two images.
    """
    arrays: dict[str, Any] = {}
    for layer, suffix in (("pool", ""), ("spatial", "_s")):
        if layer in features.statistics:
            mu, sigma = features.statistics[layer].mu, features.statistics[layer].sigma
        else:
            rows = getattr(features, layer)
            moments = Moments(rows.shape[1])
            moments.update(rows)
            mu, sigma = rows.mean(axis=0), moments.covariance
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


def open_source(source: Source) -> ImageSource | Features:
    """Open images or features, with the cheap checks; what is already open stays as it is.

    Raises:
        InputError: There is nothing at the path, or not what evalkit reads.
    """
    if isinstance(source, Features | ImageSource):
        return source
    if isinstance(source, str | PathLike) and is_features_file(Path(source)):
        return replace(Features.load(Path(source)), name=str(source))
    return open_images(source)


def _features(
    side: ImageSource | Features,
    extractor: Extractor | None,
    store: FeatureStore | None,
    progress: Progress | None,
) -> tuple[Features, Batch]:
    origin: Literal["extracted", "stored", "file"] = "stored"
    if isinstance(side, Features):
        origin, features = "file", side
        if extractor is not None:
            if features.fingerprint != extractor.fingerprint:
                raise FeatureError(
                    f"{features.name} holds features of another extractor ({features.extractor}, "
                    f"{features.fingerprint[:12]}) than the one in use ({extractor.name}, "
                    f"{extractor.fingerprint[:12]}): weights, preprocessing, precision or backend differ. "
                    "Extract it again with `evalkit features`, or choose the settings it was made with."
                )
            if features.logits is None and features.pool is not None:
                features = replace(features, logits=extractor.logits(features.pool))
    else:
        assert extractor is not None
        if not len(side):
            origin = "file"

        def watch(stage: str, done: int, total: int) -> None:
            nonlocal origin
            if done < total:
                origin = "extracted"
            if progress:
                progress(stage, done, total)

        features = extract(side, extractor, store=store, progress=watch)
    batch = Batch(
        name=features.name,
        images=len(features),
        image_shape=features.image_shape,
        digest=features.digest,
        statistics="file" if features.statistics else "images",
        statistics_images=_statistics_images(side) if features.statistics else len(features),
        features=origin,
    )
    return features, batch


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
    if samples.statistics:
        yield (
            f"{samples.name} was given as samples and carries mu and sigma: FID and sFID use these, not its "
            "images, as the reference evaluator does. If it is a reference batch, its FID is near 0."
        )
    if batches[0].digest == batches[1].digest and len(reference):
        yield "Reference and samples are the same images: precision and recall are 1 by construction."
    if 0 < len(samples) < PUBLISHED_IMAGES:
        yield (
            f"{samples.name} holds {len(samples):,} images; published numbers use {PUBLISHED_IMAGES:,}. "
            "Fewer images raise FID and sFID: compare only with numbers of the same N."
        )
    singular = [features for features in results if _has_singular_covariance(features)]
    if singular:
        names = " and ".join(f"{features.name} ({len(features):,} images)" for features in singular)
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
        if features.statistics and made_by not in (None, features.fingerprint):
            yield (
                f"The statistics in {features.name} are of another extractor than the one in use (weights, "
                "precision or backend differ): FID and sFID mix the two."
            )
        yield from _label_warning(features)
    for side in sides:
        if isinstance(side, ImageSource):
            yield from side.notes


def _has_singular_covariance(features: Features) -> bool:
    pool = features.pool
    return not features.statistics and pool is not None and is_rank_deficient(*pool.shape)


def _label_warning(features: Features) -> Iterator[str]:
    """Labels drawn uniformly spread like a Poisson variable; far beyond that they were not."""
    if features.labels is None or not len(features.labels):
        return
    counts = np.bincount(features.labels - features.labels.min())
    counts = counts[counts > 0]
    expected = counts.mean()
    if len(counts) > 1 and np.abs(counts - expected).max() > max(6 * np.sqrt(expected), 2):
        yield (
            f"The labels of {features.name} are far from uniform: {len(counts)} classes of {counts.min()} to "
            f"{counts.max()} images. Published numbers use labels drawn uniformly."
        )


def _size(features: Features) -> str:
    assert features.image_shape is not None
    return f"{features.image_shape[1]}x{features.image_shape[0]}"


def _drift(sides: list[ImageSource | Features], extractor: Inception, protocol: str) -> dict[str, Any]:
    """What the reduced precision moves each score by, measured on the first images of both batches."""
    if not all(isinstance(side, ImageSource) and len(side) > 3 for side in sides):
        return {}
    heads = [next(side.batches(DRIFT_IMAGES)) for side in sides if isinstance(side, ImageSource)]
    drift: dict[str, Any] = {"images": [len(head) for head in heads]}
    for candidate in (extractor.at_precision("float32"), extractor):
        features = [extract(open_images(head), candidate) for head in heads]
        drift[candidate.precision] = {
            score.name: score.value
            for metric in PROTOCOLS[protocol]
            if not (metric.names == ("inception_score",) and features[1].logits is None)
            for score in metric(*features, device=_algebra_device(extractor))
        }
    return drift


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
    versions = {"python": platform.python_version()}
    for package in ("evalkit", "torch", "numpy", "scipy", "tensorflow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


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
            self.seconds[name] = round(time.perf_counter() - begin, 3)
