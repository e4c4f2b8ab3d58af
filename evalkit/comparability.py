"""Which scores of several comparisons can be compared, and why others cannot.

Each rule compares one property of scores, such as the protocol. Values can be compared if all rules agree::

    for reason in reasons_of([ours, theirs]):
        print(reason.text, reason.scores)  # different reference: ...  ('fid', 'sfid')

A property that is missing from a record is never assumed to be the same; this is a reason of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evalkit.batches import Batch
from evalkit.errors import brief
from evalkit.results import Comparison, Score

__all__ = ["Reason", "reasons_of"]

DIGITS = 12
"""Number of digits of a digest that are shown."""

# Parameters that need not match. Two seeds give two draws of the same score, and numbers of classes and
# images depend on the draw. The size of a subset is part of other rules. If FID was computed from sums, its
# mean is float64, which changes it only by rounding.
_NOT_COMPARED = {
    *("seed", "subset", "subset_seed"),
    *("classes", "left_out", "reference_images", "sample_images", "cells"),
    *("distance", "mean_dtype"),
}


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why values of some scores cannot be compared with the others of the same score.

    Attributes:
        text: The reason in words, such as ``different protocol: clean-fid instead of adm``.
        cells: The values that it marks, as number of the comparison, from 0, and name of the score.
    """

    text: str
    cells: tuple[tuple[int, str], ...]

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that it concerns."""
        return tuple(dict.fromkeys(name for _, name in self.cells))

    @property
    def comparisons(self) -> tuple[int, ...]:
        """Numbers of the comparisons that it marks."""
        return tuple(sorted({number for number, _ in self.cells}))


def reasons_of(comparisons: Sequence[Comparison]) -> tuple[Reason, ...]:
    """Why scores of these comparisons cannot be compared; empty if all can.

    Each score is compared with that of the first comparison that has it, and differing values are marked. So
    two values can be compared if and only if they are marked with the same reasons, none of which is that
    something is not recorded.
    """
    comparisons = _with_digests_of_one_kind(comparisons)
    names = dict.fromkeys(score.name for each in comparisons for score in each.scores)
    cells: dict[str, list[tuple[int, str]]] = {}
    for rule in _RULES:
        for name in names:
            for number, text in _differences(rule, name, comparisons):
                cells.setdefault(text, []).append((number, name))
    return tuple(Reason(text=text, cells=tuple(marked)) for text, marked in cells.items())


def _with_digests_of_one_kind(comparisons: Sequence[Comparison]) -> Sequence[Comparison]:
    """Earlier records have only one digest of all statistics in a file; then use it for all records."""
    if all(each.reference.output_digests for each in comparisons if each.reference.statistics == "file"):
        return comparisons
    return [replace(each, reference=replace(each.reference, output_digests={})) for each in comparisons]


def _differences(rule: _Rule, name: str, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, str]]:
    """Where a rule marks a score, by number of the comparison, and why. Equal texts are of equal facts."""
    scores = {i: score for i, each in enumerate(comparisons) if (score := each.score(name)) is not None}
    standards: dict[str, _Fact] = {}  # by protocol, where the rule looks within one
    told: dict[str, object] = {}
    for number, score in scores.items() if len(scores) > 1 else ():
        fact = rule.of(comparisons[number], score)
        if fact is None:
            continue
        if fact.key is None:
            yield number, f"{rule.name} not recorded"
            continue
        within = _protocol_of(comparisons[number], score) if rule.within_protocol else ""
        standard = standards.setdefault(within, fact)
        if fact.key == standard.key:
            continue
        text = _unlike(fact, standard)
        if told.setdefault(text, fact.key) != fact.key:
            text = f"{fact.words} instead of {standard.words}"
        yield number, f"different {rule.name}: {text}"


@dataclass(frozen=True, kw_only=True)
class _Fact:
    """What a rule finds.

    Attributes:
        key: Equal where two values are like for like; None: not recorded.
        words: What it is.
        parts: Of a fact with several: each by name, of which those that differ are said.
    """

    key: object
    words: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)


_NOT_RECORDED = _Fact(key=None)


def _unlike(fact: _Fact, standard: _Fact) -> str:
    """The difference in words: ``clean-fid instead of adm``."""
    both = [name for name in fact.parts if name in standard.parts]
    differing = [name for name in both if fact.parts[name] != standard.parts[name]]
    if not differing:
        return f"{fact.words} instead of {standard.words}"
    return "; ".join(f"{name} {fact.parts[name]} instead of {standard.parts[name]}" for name in differing)


# The rules: what has to be the same. None where the score does not depend on it --------------------------


def _protocol_of(comparison: Comparison, score: Score) -> str:
    """Of several protocols that of the score: ``fid@clean-fid`` is clean-fid's, ``fid`` the first one's."""
    first, *others = comparison.protocol.split(",")
    of = score.name.partition("@")[2]
    return of if of in others else first


def _protocol(comparison: Comparison, score: Score) -> _Fact:
    found = _protocol_of(comparison, score)
    return _Fact(key=found, words=found)


def _network(comparison: Comparison, score: Score) -> _Fact:
    """Compares fingerprints of weights, resize, precision and backend; other tools' features have none."""
    if comparison.samples.extracted_by or (
        comparison.reference.extracted_by and score.reference != "nothing"
    ):
        return _NOT_RECORDED
    outputs = score.outputs or [text for text in (score.parameters.get("output"),) if isinstance(text, str)]
    networks = dict.fromkeys(output.partition(":")[0] for output in outputs)
    if not networks and len(comparison.extractors) == 1:
        networks = dict.fromkeys(comparison.extractors)
    found = [comparison.extractors.get(network, {}) for network in networks]
    prints = [str(extractor.get("fingerprint", "")) for extractor in found]
    if not prints or not all(prints):
        return _NOT_RECORDED
    parts: dict[str, str] = {}
    for network, extractor in zip(networks, found, strict=True):
        of = f" of {network}" if len(found) > 1 else ""
        parts |= {f"{name}{of}": text for name, text in _parts(extractor).items()}
    words = " and ".join(
        f"{extractor['name']} (fingerprint {each[:DIGITS]})"
        for extractor, each in zip(found, prints, strict=True)
    )
    return _Fact(key=tuple(prints), words=words, parts=parts)


def _parts(extractor: Mapping[str, Any]) -> dict[str, str]:
    weights = extractor.get("weights")
    parts = {
        "weights": str(weights["digest"])[:DIGITS]
        if isinstance(weights, Mapping) and "digest" in weights
        else None,
        "resize": extractor.get("preprocess"),
        "precision": extractor.get("precision"),
        "backend": extractor.get("backend"),
    }
    return {name: str(text) for name, text in parts.items() if text is not None}


def _byte_rule(comparison: Comparison, score: Score) -> _Fact:
    found = comparison.byte_rules.get(_protocol_of(comparison, score))
    return _Fact(key=found, words=(found or "").rstrip("."))


def _parameters(comparison: Comparison, score: Score) -> _Fact:
    del comparison
    found = {name: json.dumps(value) for name, value in score.parameters.items() if name not in _NOT_COMPARED}
    every = ", ".join(f"{name} {value}" for name, value in found.items())
    return _Fact(key=tuple(sorted(found.items())), words=every or "none", parts=found)


def _reference(comparison: Comparison, score: Score) -> _Fact | None:
    """Compares digests of what the score uses, which old records state only for files without statistics."""
    batch, seen = comparison.reference, score.reference
    if seen is None and batch.statistics == "images":
        seen = "images"
    if seen == "nothing":
        return None
    if seen == "statistics":
        return _statistics(batch, score)
    if seen is None or not batch.digest:
        return _NOT_RECORDED
    drawn = _drawn(score, batch.images)
    of = f"{drawn:,} of " if drawn else ""
    what = f"{of}the images of {_source(batch)} ({_count(batch.images)}digest {batch.digest[:DIGITS]})"
    return _Fact(key=("images", batch.digest, drawn), words=what)


def _statistics(batch: Batch, score: Score) -> _Fact:
    """Compares digests of the score's outputs, or in earlier records the digest of the whole file."""
    digests = {key: batch.output_digests[key] for key in score.outputs if key in batch.output_digests}
    key: tuple[object, ...] = tuple(digests.values())
    if not digests:
        if not batch.statistics_digest:
            return _NOT_RECORDED
        key = (batch.statistics_digest,)
    # Other outputs of such a score were computed from the images.
    others = batch.digest if len(score.outputs) > max(1, len(digests)) else None
    shown = " and ".join(str(digest)[:DIGITS] for digest in key)
    what = f"the statistics of {_source(batch)} ({_count(batch.statistics_images)}digest {shown})"
    what += f" and its images (digest {others[:DIGITS]})" if others else ""
    return _Fact(key=("statistics", key, others), words=what)


def _source(batch: Batch) -> str:
    return brief(batch.source or batch.name, 80)


def _count(images: int | None) -> str:
    return f"{images:,} images, " if images else ""


def _samples(comparison: Comparison, score: Score) -> _Fact | None:
    """Applies where bias depends on the number; for unbiased scores, it only affects the standard error."""
    if score.unbiased == score.value:
        return None
    batch = comparison.samples
    count: int | None = _drawn(score, batch.images) or batch.images
    if score.samples == "statistics" or not count:
        count = batch.statistics_images
    return _Fact(key=count, words=f"{count:,}") if count else _NOT_RECORDED


def _seen_of_samples(comparison: Comparison, score: Score) -> _Fact:
    """Whether the score uses the images, or statistics next to them, which may belong to other images."""
    batch = comparison.samples
    if not batch.images or batch.statistics == "images":
        return _Fact(key="images", words="the images")
    if score.samples is None:  # as in earlier records
        return _NOT_RECORDED
    beside = "the mean and covariance in their file, which may not be of its images,"
    return _Fact(key=score.samples, words="the images" if score.samples == "images" else beside)


def _drawn(score: Score, images: int) -> int | None:
    """Size of the subset that a score was computed from; None if from all images."""
    subset = score.parameters.get("subset")
    return subset if isinstance(subset, int) and subset < images else None


def _labels(comparison: Comparison, score: Score) -> _Fact:
    del score
    found = comparison.samples.labels
    if found is None:
        return _NOT_RECORDED
    # The number of samples says how many images balanced classes have; of random ones, all varies by chance.
    keys: dict[str, tuple[object, ...]] = {
        "balanced": (found.classes,),
        "uneven": (found.classes, found.least, found.most),
    }
    return _Fact(key=(found.kind, *keys.get(found.kind, ())), words=str(found))


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What has to be the same.

    Attributes:
        name: As a reason calls it.
        of: What a score of a comparison has; None where the score does not depend on it.
        within_protocol: Whether it is compared only between values of one protocol. Between two, it
            differs anyway.
    """

    name: str
    of: Callable[[Comparison, Score], _Fact | None]
    within_protocol: bool = False


_RULES = (
    _Rule(name="protocol", of=_protocol),
    _Rule(name="reference", of=_reference),
    _Rule(name="samples", of=_seen_of_samples),
    _Rule(name="number of samples", of=_samples),
    _Rule(name="label balance of the samples", of=_labels),
    _Rule(name="network", of=_network),
    _Rule(name="byte rule", of=_byte_rule, within_protocol=True),
    _Rule(name="parameters", of=_parameters, within_protocol=True),
)
