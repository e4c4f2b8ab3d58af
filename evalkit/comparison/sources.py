"""A reference and any number of sets of samples: opened with the cheap checks, then turned into features."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evalkit.batches import Batch
from evalkit.comparison.balance import label_balance
from evalkit.comparison.plan import Plan
from evalkit.errors import InputError
from evalkit.extractors import make_extractor
from evalkit.extractors.base import Extractor
from evalkit.features.adm_npz import (
    outputs_in_file,
    written_images,
    written_preprocess,
    written_record,
)
from evalkit.features.extraction import Extraction, Wanted, derive
from evalkit.features.moments import Moments
from evalkit.features.other_tools import read_rows
from evalkit.features.record import (
    BatchFeatures,
    Features,
    is_features_file,
    split_output,
)
from evalkit.images import (
    ImageSource,
    SupportsArray,
    ValueRange,
    check_range_used,
    is_pattern,
    open_images,
    parse_value_range,
)
from evalkit.metrics.frechet import is_rank_deficient
from evalkit.system.background import Background
from evalkit.system.run import Run
from evalkit.system.storage import Remote, place_of
from evalkit.system.urls import is_url

__all__ = [
    "Opened",
    "Side",
    "Source",
    "as_published",
    "file_networks",
    "file_outputs",
    "has_full_rank",
    "has_plain_statistics",
    "has_statistics",
    "hash_ahead",
    "make_extractors",
    "open_source",
    "open_sources",
    "widths_of",
]

Source = str | PathLike[str] | SupportsArray | ImageSource | Features
"""A path or URL of images, statistics or features; an array of images; or either of these already open."""

Opened = ImageSource | Features

log = logging.getLogger(__name__)


def open_source(source: Source, value_range: ValueRange | None = None) -> Opened:
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
    if isinstance(source, str | PathLike):
        # A pattern is not looked for as a file at a URL.
        place = place_of(source) if not is_url(source) or not is_pattern(source) else None
        if place is not None and is_features_file(place):
            return replace(Features.load(place), name=str(place if isinstance(place, Remote) else source))
        if place is not None and (rows := read_rows(place)) is not None:
            return rows
        if isinstance(place, Remote):
            return open_images(place, value_range=value_range)
    return open_images(source, value_range=value_range)


def as_published(source: Opened, name: str, resize: str | None = None) -> Opened:
    """A file with what is known of it as a published batch.

    Args:
        source: The file, open.
        name: The batch's name.
        resize: How the images behind its statistics were resized, in words, if the file does not say.
    """
    if isinstance(source, Features):
        return replace(source, published=name)
    source.published = name
    if resize is not None and written_preprocess(source) is None:
        known = {**written_record(source), "preprocess": resize}
        source.provenance = {**(source.provenance or {}), "statistics": known}
    return source


def open_sources(*sources: Source, value_range: ValueRange | None = None) -> list[Opened]:
    """Open all sides before any work on one; see :func:`open_source`.

    Raises:
        InputError: As :func:`open_source`, or a value range for sources without floats.
    """
    opened = [open_source(source, value_range) for source in sources]
    check_range_used(opened, value_range)
    return opened


def file_outputs(source: Opened) -> set[str]:
    """The outputs, ``"network:output"``, of which a file carries mean and covariance."""
    if isinstance(source, Features):
        return {f"{source.network}:{output}" for output in source.gaussians}
    return {*outputs_in_file(source).values()}


def file_networks(source: Opened) -> set[str]:
    """The networks of whose outputs a file carries mean and covariance."""
    return {split_output(output)[0] for output in file_outputs(source)}


def has_statistics(source: Opened, outputs: Iterable[str]) -> bool:
    """Whether a file carries mean and covariance of the network of one of these outputs."""
    return not file_networks(source).isdisjoint(split_output(output)[0] for output in outputs)


def has_plain_statistics(source: Opened) -> bool:
    """Whether a file has ``mu`` and ``sigma`` alone, as many tools write them, each behind its own resize."""
    if isinstance(source, Features) or source.kind != "npz":
        return False
    return (source.statistics or {}).keys() == {"mu", "sigma"}


def make_extractors(
    networks: Iterable[str],
    given: Extractor | Sequence[Extractor] | None,
    sources: Collection[Opened],
    run: Run,
) -> dict[str, Extractor]:
    """The extractor of each network: the one given, or else one with its defaults.

    None is made where no images are to be extracted.

    Raises:
        InputError: What was given is no extractor.
        WeightsError: A network has no weights.
    """
    offered: list[Extractor] = []
    if given is not None:
        offered = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for extractor in offered:
        if isinstance(extractor, type) or not isinstance(extractor, Extractor):
            raise InputError(
                f'extractor={extractor!r}: expected a network, such as evalkit.Inception(device="cuda").'
            )
    found = {extractor.network: extractor for extractor in offered}
    if unused := found.keys() - set(networks):
        log.warning("No metric here needs the network %s, which was given.", ", ".join(sorted(unused)))
    if any(isinstance(source, ImageSource) for source in sources):
        for network in networks:
            if network not in found:
                found[network] = make_extractor(network, device=run.device)
    return {network: found[network] for network in networks if network in found}


def widths_of(sources: Iterable[Opened], extractors: Mapping[str, Extractor]) -> dict[str, int]:
    """Width of each output, ``"network:output"``, as far as it is known before the work."""
    found: dict[str, int] = {}
    for network, extractor in extractors.items():
        direct = extractor.outputs
        found |= {f"{network}:{output}": d for output, d in direct.items()}
        # Of the order of its base, for the estimate of memory.
        found |= {f"{network}:{output}": direct[base] for output, base in extractor.derived.items()}
    for source in sources:
        if isinstance(source, Features):
            found |= {f"{source.network}:{key}": rows.shape[1] for key, rows in source.arrays.items()}
    return found


def has_full_rank(
    sources: Sequence[Opened], extractors: Mapping[str, Extractor], outputs: Collection[str]
) -> bool:
    """Whether a side has its own Gaussians, or more images than the narrowest of these outputs is wide."""
    known = widths_of(sources, extractors)
    least = min((known[output] for output in outputs if output in known), default=0)
    return any(
        has_statistics(source, outputs) or not is_rank_deficient(len(source), least) for source in sources
    )


def hash_ahead(sources: Sequence[Opened], number: int, background: Background) -> None:
    """Start to hash source ``number`` in the background, before its features are needed, if there is one.

    Does nothing if an earlier source has the same name, because its hash is cached by then.
    """
    for source in sources[number : number + 1]:
        if isinstance(source, ImageSource) and source.name not in {each.name for each in sources[:number]}:
            source.identify_ahead(background)


@dataclass(eq=False)
class Side:
    """One side of a comparison, and how its features are obtained."""

    source: Opened
    plan: Plan
    extractors: Mapping[str, Extractor]
    run: Run

    def __post_init__(self) -> None:
        self.rows: NDArray[np.int64] | None = None
        if self.plan.subset:
            self.rows = self.plan.subset.rows(len(self.source))
        there = file_outputs(self.source)
        self.moments = self.plan.moments - there  # what the file has itself is not computed
        self.is_needed = bool(len(self.source)) and bool(self.plan.rows or self.moments)
        self._extraction: Extraction | None = None
        if isinstance(self.source, ImageSource):
            self._extraction = Extraction(self.source, self.wanted, rows=self.rows, run=self.run)

    @property
    def wanted(self) -> list[Wanted]:
        """What is wanted of each network."""
        return [
            Wanted(
                extractor=extractor,
                arrays=_of_network(network, self.plan.rows),
                moments=_of_network(network, self.moments),
            )
            for network, extractor in self.extractors.items()
        ]

    @property
    def kept(self) -> int:
        """Number of images whose rows are kept."""
        if not self.plan.rows:
            return 0
        return len(self.source) if self.rows is None else len(self.rows)

    def features(self) -> BatchFeatures:
        """The features of this side, from the file, the store or the networks."""
        if isinstance(self.source, Features):
            return BatchFeatures.of(self._of_file(self.source))
        assert self._extraction is not None
        return BatchFeatures.of(*self._extraction.features())

    def batch(self, features: BatchFeatures) -> Batch:
        """The record of this side."""
        images = len(self.source) if self.is_needed else 0
        first = next(iter(features.networks.values()))
        needed = {output for metric in self.plan.metrics for output in metric.needs}
        of_file = has_statistics(self.source, needed)
        preprocess = (written_preprocess(self.source) or "not said") if of_file else None
        published = self.source.published
        digests = {
            output: gaussian.digest
            for output in sorted(file_outputs(self.source))
            if (gaussian := features.gaussian(output)) is not None
        }
        is_foreign = isinstance(self.source, Features) and not self.source.fingerprint
        origin: Literal["extracted", "stored", "file"] = "file"
        if self._extraction is not None and len(self.source):
            origin = self._extraction.origin
        return Batch(
            name=features.name,
            images=images,
            image_shape=first.image_shape,
            digest=first.digest,
            statistics="file" if of_file else "images",
            statistics_images=written_images(self.source) if of_file else images,
            features=origin,
            statistics_digest=self.source.statistics_digest,
            output_digests=digests,
            statistics_preprocess=preprocess,
            extracted_by=first.extractor if is_foreign else "",
            source=f"published {published}" if published else features.name,
            labels=label_balance(first.labels),
        )

    def _of_file(self, features: Features) -> Features:
        network = features.network
        extractor = self.extractors.get(network)
        gaussians = dict(features.gaussians)
        for output in _of_network(network, self.moments):
            if output in features.arrays:
                gaussians[output] = Moments.of(features.arrays[output]).gaussian()
        arrays = dict(features.arrays)
        if self.rows is not None:
            arrays = {output: rows[self.rows] for output, rows in arrays.items()}
        wanted = _of_network(network, self.plan.rows)
        there = ", ".join(features.arrays) or "statistics"
        absent = {
            output: f"{features.name} holds no {output} features, only {there}; this needs the images"
            for output in wanted
            if output not in arrays
        }
        if extractor is not None:
            due = [output for output in absent if extractor.derived.get(output) in arrays]
            derived, refused = derive(extractor, due, arrays)
            arrays |= derived
            absent |= refused
        kept = replace(features, arrays=arrays, gaussians=gaussians, absent=absent, count=len(features))
        return kept.select(wanted)


def _of_network(network: str, outputs: Iterable[str]) -> list[str]:
    """Outputs without the name of their network, those of this network alone; sorted."""
    return sorted(key for of, key in map(split_output, outputs) if of == network)
