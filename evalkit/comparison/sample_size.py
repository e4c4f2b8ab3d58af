"""How many samples a difference takes, from how the scores of one or two sets of samples deviate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evalkit.comparison import measure
from evalkit.comparison.networks import settle_features
from evalkit.comparison.pairs import Measured, check_paired, pairs_of_sets
from evalkit.comparison.plan import choose_metrics
from evalkit.comparison.sources import Source, make_extractors, open_sources, widths_of
from evalkit.errors import InputError, UndefinedMetricError
from evalkit.extractors.base import Extractor
from evalkit.images import ValueRange
from evalkit.metrics.base import Metric
from evalkit.metrics.frechet import is_rank_deficient
from evalkit.pairs import Difference, Pair
from evalkit.results import Comparison, ScoreSpec
from evalkit.system.devices import prepare_forked_process
from evalkit.system.records import record_text
from evalkit.system.run import Run
from evalkit.uncertainty import detectable_difference, required_images

__all__ = ["Required", "SamplePlan", "SampleSize", "check_request", "plan_samples"]

FORMAT = "evalkit plan 1"


@dataclass(frozen=True, kw_only=True)
class Required:
    """How many images each of two sets needs, so that a difference shows at 5 % with 80 % power.

    Attributes:
        difference: The true difference.
        images: How many; None where no number is enough.
        why: Why no number is enough, or why more are needed than these; empty if neither.
    """

    difference: float
    images: int | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """What one set of samples, or two, say of the sample size in one score.

    Attributes:
        spec: How the score is called and shown.
        images: Number of samples of each set.
        stderrs: Standard error of the score of each set from the draw of its samples.
        difference: The first score minus the second; None where there is one set.
        unbiased: Whether this is the difference of the values without bias.
        detectable: The smallest true difference that shows at 5 % with 80 % power: between two independent
            sets like the one, or between the two. 0 where the standard error is 0, and then says nothing.
        required: For the difference to be shown; of two sets, then for their difference as measured.
    """

    spec: ScoreSpec
    images: tuple[int, ...]
    stderrs: tuple[float, ...]
    difference: Difference | None = None
    unbiased: bool = False
    detectable: float
    required: tuple[Required, ...]


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """How many samples a difference takes, in each score.

    Attributes:
        detect: The difference to be shown.
        comparisons: Of each set of samples with the reference.
        sizes: By score, in the order of tables.
        missing: By score, why there is no answer.
    """

    detect: float
    comparisons: tuple[Comparison, ...]
    sizes: tuple[SampleSize, ...]
    missing: Mapping[str, str]

    def to_json(self) -> str:
        """JSON text."""
        return record_text(self, FORMAT)


def check_request(detect: float, samples: Sequence[Source], paired: bool | None) -> None:
    """Cheap check before anything is opened that there is something to plan.

    Args:
        detect: See :func:`plan_samples`, also for the others.
        samples: Likewise.
        paired: Likewise.

    Raises:
        InputError: ``detect`` is not positive and finite, there is not one set or two, or ``paired`` is given
            with one.
    """
    if not (math.isfinite(detect) and detect > 0):
        raise InputError(
            f"A difference of {detect} cannot be planned for; give a positive number, such as 0.1 (--detect, "
            "detect=)."
        )
    if not 1 <= len(samples) <= 2:
        raise InputError(f"{len(samples)} sets of samples; give one, or two to be compared.")
    if paired is not None and len(samples) == 1:
        raise InputError("Two sets are paired or not (--paired, --unpaired, paired=); give a second one.")


def plan_samples(
    reference: Source,
    *samples: Source,
    detect: float,
    metrics: Collection[str | Metric] | str | Metric = "fid",
    paired: bool | None = None,
    value_range: ValueRange | None = None,
    extractor: Extractor | Sequence[Extractor] | None = None,
    run: Run | None = None,
    **how: Any,
) -> SamplePlan:
    """How many samples two sets need, so that a difference between their scores shows at 5 % with 80 % power.

    The variance from the draw of the samples is taken to fall with 1/n. What the reference causes does not:
    two sets like the one given have it in common, so that it cancels; of two given sets it is measured.

    Args:
        reference: See :func:`evalkit.compare`, also for the others.
        *samples: One set, or two that are to be compared.
        detect: The difference to be shown, in units of the score; positive.
        metrics: Which metrics, as `compare` takes them.
        paired: Whether images of the same index in the two sets are of the same noise and class; None: where
            the files of `evalkit sample` say so.
        value_range: Likewise.
        extractor: Likewise.
        run: Likewise.
        **how: Likewise.

    Raises:
        InputError: See :func:`check_request`.
        UndefinedMetricError: There is no answer in any score.
        EvalkitError: As `compare` raises.
    """
    check_request(detect, samples, paired)
    prepare_forked_process()
    run, choice = Run.of(run, how), choose_metrics("adm", metrics)
    sources = open_sources(reference, *samples, value_range=value_range)
    if paired:
        check_paired(sources[1:])
    sources = settle_features(sources, choice.networks)
    extractors = make_extractors(choice.networks, extractor, sources, run)
    found = measure(sources, choice, extractor=[*extractors.values()], keep_rows=True, run=run)
    pairs = {pair.score: pair for pair in pairs_of_sets(found, sources[1:], paired)}
    widths = widths_of(sources, extractors)
    sizes, missing = [], {}
    for metric in choice.metrics:
        # A covariance of no more images than features is singular.
        needs = metric.needs.items()
        width = max((widths.get(output, 0) for output, need in needs if need == "gaussian"), default=0)
        for spec in metric.scores:
            try:
                if len(found) == 1:
                    size = _of_one(spec, found[0], detect)
                else:
                    size = _of_two(spec, found, pairs, detect)
            except UndefinedMetricError as error:
                missing[spec.name] = str(error)
                continue
            enough = tuple(_enough(each, width) for each in size.required)
            sizes.append(dataclasses.replace(size, required=enough))
    if not sizes:
        reasons: dict[str, list[str]] = {}
        for spec in (spec for metric in choice.metrics for spec in metric.scores):
            reasons.setdefault(missing[spec.name].rstrip("."), []).append(spec.title)
        listed = "; ".join(f"{' and '.join(titles)}: {why}" for why, titles in reasons.items())
        raise UndefinedMetricError(f"No sample size can be planned. {listed}.")
    comparisons = tuple(each.comparison for each in found)
    return SamplePlan(detect=detect, comparisons=comparisons, sizes=tuple(sizes), missing=missing)


def _of_one(spec: ScoreSpec, measured: Measured, detect: float) -> SampleSize:
    """For two independent sets like this one."""
    found = measured.deviations_of(spec.name)
    stderr = math.sqrt(2) * found.stderr_sampling
    return SampleSize(
        spec=spec,
        images=(found.images,),
        stderrs=(found.stderr_sampling,),
        detectable=detectable_difference(stderr),
        required=(_required(detect, stderr, found.images),),
    )


def _of_two(
    spec: ScoreSpec, measured: Sequence[Measured], pairs: Mapping[str, Pair], detect: float
) -> SampleSize:
    """For these two."""
    first, second = (each.deviations_of(spec.name) for each in measured)
    pair = pairs[spec.name]
    if pair.difference is None:
        raise UndefinedMetricError(pair.why)
    found = pair.difference
    of_samples = first.given_reference().variance_of_difference(second.given_reference(), paired=found.paired)
    # What more samples do not reduce.
    fixed = math.sqrt(max(0.0, found.stderr**2 - of_samples))
    images = first.images
    if images != second.images:  # as if the second had as many as the first
        of_samples = first.stderr_sampling**2 + second.stderr_sampling**2 * second.images / images
    return SampleSize(
        spec=spec,
        images=(first.images, second.images),
        stderrs=(first.stderr_sampling, second.stderr_sampling),
        difference=found,
        unbiased=pair.unbiased,
        detectable=detectable_difference(found.stderr),
        required=tuple(
            _required(each, math.sqrt(of_samples), images, fixed) for each in (detect, abs(found.value))
        ),
    )


def _required(difference: float, stderr: float, images: int, fixed: float = 0.0) -> Required:
    if not difference:
        return Required(difference=0.0, why="the two sets do not differ")
    try:
        needed = required_images(difference, stderr, images, fixed=fixed)
    except UndefinedMetricError as error:
        return Required(difference=difference, why=str(error))
    if not stderr:
        why = (
            "the draw of the samples gives a standard error of 0, which says nothing about how many are "
            "needed; give more samples, or other ones"
        )
        return Required(difference=difference, why=why)
    return Required(difference=difference, images=needed)


def _enough(required: Required, width: int) -> Required:
    """With a remark, where so few images have a singular covariance."""
    if required.images is None or not is_rank_deficient(required.images, width):
        return required
    return dataclasses.replace(
        required,
        why=f"{required.images:,} images are no more than the {width:,} features, which makes covariances "
        f"singular; use more than {width:,}",
    )
