"""What a reader should know beside the numbers: memory before the work, warnings after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from evalkit.batches import Batch
from evalkit.comparison.balance import are_far_from_uniform
from evalkit.comparison.networks import inception_networks, settle_features, settle_statistics
from evalkit.comparison.plan import Choice, Plan
from evalkit.comparison.sources import (
    Opened,
    Side,
    file_networks,
    file_outputs,
    has_plain_statistics,
    widths_of,
)
from evalkit.errors import UndefinedMetricError
from evalkit.extractors.base import Extractor
from evalkit.features.adm_npz import outputs_in_file, written_preprocess, written_record
from evalkit.features.other_tools import modes_of
from evalkit.features.record import BatchFeatures, Features, split_output
from evalkit.images import are_ids
from evalkit.metrics.base import LABELS_NEEDED, Metric
from evalkit.metrics.frechet import is_rank_deficient
from evalkit.system.files import physical_memory

__all__ = ["PUBLISHED_NUMBERS", "check_sources", "memory_needed", "warnings_of"]

WORTH_SAYING = 5e8
"""Bytes of memory from which on they are announced."""

PUBLISHED_NUMBERS = "published numbers use"
"""Warnings of what keeps a number from being compared with published ones have these words."""


def _check_enough_images(source: Opened, published: int) -> None:
    """Raise an UndefinedMetricError for a batch of one image without statistics."""
    if len(source) == 1 and not file_outputs(source):
        raise UndefinedMetricError(
            f"{source.name} holds one image; no metric of a batch is defined for it. Give at least 4 images, "
            f"and {published:,} for published numbers."
        )


def _check_labels(source: Opened, metrics: Sequence[Metric]) -> None:
    """Raise an UndefinedMetricError for a batch without labels, if no metric can do without them."""
    if source.labels is None and metrics and all(getattr(each, "needs_labels", False) for each in metrics):
        why = getattr(source, "labels_problem", None)
        raise UndefinedMetricError(f"{source.name} has no labels; {LABELS_NEEDED}.{f' {why}' if why else ''}")


def check_sources(sources: Sequence[Opened], choice: Choice) -> list[Opened]:
    """Determine the networks of statistics and features, and refuse unsuitable input before any work.

    Returns:
        The sources, with the network of other tools' features determined.

    Raises:
        InputError: A source has features of a network that no metric needs.
        UndefinedMetricError: There is only one image, or labels are missing and all metrics need them.
    """
    settle_statistics(sources, choice.networks)
    for source in sources:
        _check_enough_images(source, choice.protocol.published_images)
        _check_labels(source, choice.metrics)
    return settle_features(sources, choice.networks)


def memory_needed(sides: Sequence[Side], plan: Plan, *, error_bars: bool) -> str | None:
    """What the rows and the metrics will need, in words; None where that is little."""
    images = sum(side.kept for side in sides)
    widths = widths_of([side.source for side in sides], sides[0].extractors)
    rows = 4 * images * sum(widths.get(output, 0) for output in plan.rows)
    work = {}
    for metric in plan.metrics:
        name = " and ".join(spec.name for spec in metric.scores)
        width = sum(widths.get(output, 0) for output in metric.needs)
        work[name] = images * getattr(metric, "working_bytes", 0) * width
        if error_bars and plan.rows.issuperset(metric.needs) and hasattr(metric, "influence_bytes"):
            kept = [side.kept for side in sides]
            work[f"error bars of {name}"] = metric.influence_bytes(kept, width)
    hungriest = max(work, key=lambda name: work[name], default="")
    more = work.get(hungriest, 0)
    if rows + more < WORTH_SAYING:
        return None
    text = f"Memory: {_bytes(rows)} for the features of {images:,} images"
    if more:
        text += f", and up to {_bytes(more)} more for {hungriest}"
    there = physical_memory()
    if there is not None and rows + more > there:
        text += (
            f". This machine has {_bytes(there)}: use a subset (--subset 50000), or only FID and sFID "
            "(--metrics fid,sfid), which need no such memory"
        )
    return f"{text}."


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def warnings_of(
    choice: Choice,
    sources: Sequence[Opened],
    features: Sequence[BatchFeatures],
    batches: Sequence[Batch],
    extractors: Mapping[str, Extractor],
) -> Iterator[str]:
    """Reasons to be careful with a number, one sentence each."""
    reference, samples = batches
    if samples.statistics == "file":
        yield (
            f"{samples.name} was given as samples and carries mu and sigma: FID and sFID use these, not its "
            "images, as the reference evaluator does. If it is a reference batch, its FID is near 0."
        )
    if reference.digest == samples.digest and reference.images:
        yield "Reference and samples are the same images: precision and recall are 1 by construction."
    published = choice.protocol.published_images
    if 0 < samples.images < published:
        biased = [metric.scores[0].title for metric in choice.metrics if "gaussian" in metric.needs.values()]
        why = f" Fewer images raise {' and '.join(biased)}: compare" if biased else " Compare"
        yield (
            f"{samples.name} holds {samples.images:,} images; {PUBLISHED_NUMBERS} {published:,}.{why} "
            "only with numbers of the same N."
        )
    yield from _singular(choice, features, batches)
    sizes = [batch.image_shape for batch in batches]
    if all(sizes) and sizes[0] != sizes[1]:
        yield (
            f"Image sizes differ: {_size(reference)} and {_size(samples)}. Both are resized for the network; "
            "published references have the size of the samples."
        )
    for source, side in zip(sources, features, strict=True):
        made_by = written_record(source).get("fingerprint")
        of = getattr(source, "statistics_network", "")
        in_use = side.networks[of].fingerprint if of in side.networks else None
        if file_outputs(source) and made_by is not None and in_use not in (None, made_by):
            yield (
                f"The statistics in {side.name} are of another extractor than the one in use (weights, "
                "precision or backend differ): FID and sFID mix the two."
            )
        there = file_networks(source)
        if there and there.isdisjoint(choice.networks):
            yield (
                f"The statistics in {side.name} are of the network {' and '.join(sorted(there))}, which no "
                "metric here looks at: they are not used."
            )
        yield from _unknown_resize(choice, source, extractors)
        yield from _unknown_mode(source)
        of_classes = any(getattr(metric, "needs_labels", False) for metric in choice.metrics)
        yield from _label_warning(next(iter(side.networks.values())), used=of_classes)
    for source in sources:
        yield from source.notes


def _unknown_resize(choice: Choice, source: Opened, extractors: Mapping[str, Extractor]) -> Iterator[str]:
    """Whether mean and covariance may be of images that were resized in another way than the other side's."""
    if isinstance(source, Features) or not has_plain_statistics(source):
        return
    output = outputs_in_file(source)[""]
    titles = [metric.scores[0].title for metric in choice.metrics if metric.needs.get(output) == "gaussian"]
    extractor = extractors.get(split_output(output)[0])
    # Where evalkit wrote the file, it is known of which extractor it is, and compared with the one in use.
    if not titles or extractor is None or "fingerprint" in written_record(source):
        return
    scores, said = " and ".join(titles), written_preprocess(source)
    if said is not None:
        if said not in extractor.preprocess:
            yield (
                f"The images behind {source.name} were resized with {said}, and those of the other side "
                f"with {extractor.preprocess}: {scores} is WRONG. Name the protocol of the file's tool."
            )
        return
    text = (
        f"{source.name} does not say how the images behind its mean and covariance were resized, and tools "
        f"differ in that. They are taken as resized like the other side: {extractor.preprocess}. If they "
        f"were not, {scores} is wrong: name the protocol of the tool that wrote the file, such as clean-fid "
        "or pytorch-fid."
    )
    if len(inception_networks(choice.networks)) > 1:
        text += " With several protocols only ADM's resize is assumed; for another, name it alone."
    yield text


def _unknown_mode(source: Opened) -> Iterator[str]:
    """Warn if another tool's features may come from several of its modes, which resize differently."""
    modes = modes_of(source) if isinstance(source, Features) else {}
    if len(modes) > 1:
        taken = modes[source.network]  # type: ignore[union-attr]
        others = " or ".join(text for text in modes.values() if text != taken)
        yield (
            f"{source.name} does not say which mode its features come from; {taken} is assumed. If they "
            f"come from {others}, every score with them is WRONG: name that protocol."
        )


def _singular(choice: Choice, features: Sequence[BatchFeatures], batches: Sequence[Batch]) -> Iterator[str]:
    """Whether a covariance of the images is singular, with which Fréchet distances say little."""
    needed = {
        output: metric.scores[0].title
        for metric in choice.metrics
        for output, need in metric.needs.items()
        if need == "gaussian"
    }
    titles: dict[str, None] = {}
    names, widest = [], 0
    for batch, side in zip(batches, features, strict=True):
        widths = {output: side.width(output) for output in needed} if batch.statistics != "file" else {}
        found = {output: d for output, d in widths.items() if d and is_rank_deficient(batch.images, d)}
        if found:
            names.append(f"{batch.name} ({batch.images:,} images)")
            widest = max(widest, *found.values())
            titles |= dict.fromkeys(needed[output] for output in found)
    if names:
        listed = " and ".join(titles)
        yield (
            f"More features than images, so singular covariances, in {' and '.join(names)}: {listed} "
            f"{'are' if len(titles) > 1 else 'is'} exact for these images and say"
            f"{'' if len(titles) > 1 else 's'} little about their distribution. Use more than {widest:,} "
            "images, better 10,000."
        )


def _label_warning(features: Features, *, used: bool) -> Iterator[str]:
    """Labels drawn uniformly spread like a Poisson variable; far beyond that they were not."""
    if features.labels is None or not len(features.labels):
        return
    _, counts = np.unique(features.labels, return_counts=True)
    if are_ids(features.labels):
        yield (
            f"The labels of {features.name} are {len(counts):,} different numbers up to "
            f"{features.labels.max()} "
            f"for {len(features.labels):,} images. They look like seeds or ids, not classes"
            f"{'' if used else '. No metric here uses them'}."
        )
        return
    if are_far_from_uniform(counts):
        yield (
            f"The labels of {features.name} are far from uniform: {len(counts)} classes of {counts.min()} to "
            f"{counts.max()} images. {PUBLISHED_NUMBERS.capitalize()} labels drawn uniformly."
        )


def _size(batch: Batch) -> str:
    assert batch.image_shape is not None
    return f"{batch.image_shape[1]}x{batch.image_shape[0]}"
