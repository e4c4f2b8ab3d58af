"""Scores of images that arrive in batches, as in a training loop, equal to ``compare`` on all images."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.comparison.advice import check_sources
from evalkit.comparison.networks import check_fingerprints
from evalkit.comparison.plan import Plan, choose_metrics, make_plan
from evalkit.comparison.precision_check import MOST, reduced_precision
from evalkit.comparison.scores import Clock, measure_side
from evalkit.comparison.sources import (
    Opened,
    Side,
    Source,
    file_outputs,
    has_full_rank,
    make_extractors,
)
from evalkit.errors import InputError
from evalkit.evaluator.rank_reports import (
    Outcome,
    RankReport,
    check_reports,
    described,
    known_to_all,
    merged_by_rank_0,
    notes_on_repeats,
    sharing_failure,
)
from evalkit.evaluator.sides import Given, open_reference
from evalkit.extractors.base import Extractor
from evalkit.features.accumulation import Accumulation, Collected, features_from
from evalkit.features.record import BatchFeatures, split_output
from evalkit.images import ValueRange
from evalkit.images.given import GivenImages, Intake, Layout, ToBytes, labels_of, numpy_dtype
from evalkit.metrics.base import Metric
from evalkit.results import Comparison
from evalkit.system.devices import prepare_forked_process
from evalkit.system.ranks import Ranks
from evalkit.system.run import Run

__all__ = ["Evaluator"]

NAME = "<batches>"
"""Name of the images in records and messages."""

FORMAT = "evalkit evaluator 1"


class Evaluator:
    """Computes FID and other scores against a reference, from images passed batch by batch.

    ::

        evaluator = Evaluator("imagenet256", value_range="-1..1", metrics=["fid"])
        for _ in range(100):
            evaluator.update(model.sample(64))
        print(evaluator.compute()["fid"])

    In a single process, scores are bit-identical to :func:`evalkit.compare` on the same images, however they
    are split into batches. If all metrics need only means and covariances, only sums are kept; otherwise, the
    features of every image are kept. The global random state and torch's settings are not changed, and
    autocast has no effect.

    Under torch.distributed, every rank passes its own images, any number or none, and all ranks call
    :meth:`compute`. Sums are added in float64, so FID equals that of a single process up to float64 rounding.
    If metrics need features, these are sent to rank 0, which computes the scores. All ranks get the same
    comparison. Images are ordered by rank: those of rank 0, then those of rank 1, and so on.

    Args:
        reference: As for :func:`evalkit.compare`, or the name of a published batch. On rank 0, its features
            are extracted, or read from the store, when the evaluator is created.
        protocol: As for :func:`evalkit.compare`; so are `metrics`, `extractor` and `error_bars`.
        metrics: The metrics to compute; None for all of the protocol.
        value_range: Range of floats: ``"0..1"``, ``"-1..1"`` or ``"0..255"``. It is never guessed: without
            it, floats are refused. Integers always range from 0 to 255.
        layout: ``"NCHW"`` or ``"NHWC"``; None if only one of the two possible axes has length 3.
        to_bytes: How floats are converted. ``truncate``: to bytes, as in ADM's scripts,
            ``((x + 1) * 127.5).clamp(0, 255).to(uint8)``; ``round``: to bytes, with halves rounded up, as
            in torchvision's ``save_image``; ``keep``: not converted, as ``compare`` treats files of floats.
            Computed in float32, or in float64 for float64 images.
        extractor: The extractor, or one per network that the metrics need; None for the defaults.
        error_bars: Whether scores have standard errors.
        group: Process group of torch.distributed; None for all processes.
        run: Device and store. The device ``auto`` is the GPU of the local rank.
        **how: Fields of a run, in place of ``run=``: ``device="cuda:1"``.

    Raises:
        EvalkitError: As for :func:`evalkit.compare`, or an argument has an invalid value.
    """

    def __init__(
        self,
        reference: Source,
        *,
        protocol: str = "adm",
        metrics: Collection[str | Metric] | str | Metric | None = None,
        value_range: ValueRange | None = None,
        layout: Layout | None = None,
        to_bytes: ToBytes = "truncate",
        extractor: Extractor | Sequence[Extractor] | None = None,
        error_bars: bool = True,
        group: Any = None,
        run: Run | None = None,
        **how: Any,
    ) -> None:
        prepare_forked_process()
        self._run, self._choice = Run.of(run, how), choose_metrics(protocol, metrics)
        self._new_intake = partial(Intake, value_range=value_range, layout=layout, to_bytes=to_bytes)
        self._intake = self._new_intake()
        self._error_bars = error_bars
        self._group = group
        self._reference = open_reference(reference, self._run)
        (self._reference,) = check_sources([self._reference], self._choice)
        nothing = GivenImages(NAME, 0, np.empty((0, 1, 1, 3), np.uint8))
        self._extractors = make_extractors(
            self._choice.networks, extractor, [self._reference, nothing], self._run
        )
        check_fingerprints([self._reference], self._extractors)
        self._is_reduced = any(reduced_precision(each) for each in self._extractors.values())
        self._sides: dict[tuple[frozenset[str], frozenset[str]], tuple[Side, BatchFeatures]] = {}
        self.reset()
        if Ranks(group).rank == 0:
            self._of_reference(self._plan(10**9), Clock())

    def reset(self) -> None:
        """Discard all images. The features of the reference are kept."""
        few, many = self._plan(0), self._plan(10**9)
        extractors = self._extractors
        rows: dict[str, list[str]] = {}
        sums: dict[str, dict[str, int]] = {}
        for output in sorted(few.rows):
            network, key = split_output(output)
            base = extractors[network].derived.get(key, key)
            if base not in rows.setdefault(network, []):
                rows[network].append(base)
        for output in sorted(many.moments):
            network, key = split_output(output)
            sums.setdefault(network, {})[key] = extractors[network].outputs[key]
        self._accumulation = Accumulation(NAME, tuple(extractors.values()), rows, sums)
        self._intake = self._new_intake()
        self._labels: list[NDArray[np.int64]] | None = None
        self._shape: tuple[int, ...] | None = None
        self._dtype: np.dtype[Any] | None = None
        self._first: list[NDArray[Any]] = []
        self._first_batch = ""

    def update(self, images: object, labels: object = None) -> None:
        """Add images.

        Args:
            images: (n, 3, h, w) or (n, h, w, 3), a tensor on any device or an array: uint8, other integers
                from 0 to 255, or floats in the declared range. All images must have the same size.
            labels: (n,) integers, the class of each image. Give labels for all images or for none.

        Raises:
            InputError: The images are invalid, or their range was not declared. No image is added.
            FeatureError: Features are not finite.
        """
        intake = copy.deepcopy(self._intake)
        batch = intake.batch(images)
        found = None if labels is None else labels_of(labels, len(batch))
        if not len(batch):
            return
        shape, dtype = tuple(batch.shape[1:]), numpy_dtype(batch)
        if self._shape is None:
            self._shape, self._dtype = shape, dtype
            self._labels = None if found is None else []
            self._first_batch = hashlib.sha256(batch.cpu().numpy().data).hexdigest()
        if (shape, dtype) != (self._shape, self._dtype):
            raise InputError(
                f"The images are {described(shape, dtype)}, but earlier images were "
                f"{described(self._shape, self._dtype)}; expected one size and type. Call reset() to restart."
            )
        if (found is None) != (self._labels is None):
            raise InputError("Labels were given for some of the images; expected them for all or for none.")
        self._intake = intake
        if found is not None and self._labels is not None:
            self._labels.append(found)
        # The precision check runs these again in float32.
        if self._is_reduced and (missing := MOST - sum(map(len, self._first))) > 0:
            self._first.append(batch[:missing].cpu().numpy().copy())
        self._accumulation.add(batch)
        if self._accumulation.keeps_rows and not self._plan(self._accumulation.count).rows:
            self._accumulation.drop_rows()

    @known_to_all()
    def compute(self) -> Comparison:
        """Compute the scores of all images so far, with a record of how they were measured.

        More images may be added afterwards. Under torch.distributed, every rank must call this. An error on
        one rank is raised on all.

        Raises:
            UndefinedMetricError: There are too few images.
            EvalkitError: As for :func:`evalkit.compare`; or ranks have different arguments, or a rank failed.
        """
        ranks, clock = Ranks(self._group), Clock()
        with clock.stage("features of samples"):
            collected, reports = self._reports_of_all(ranks)
            plan = self._plan(sum(each.count for each in reports))
            images = self._all_images(ranks, reports)
            merged = merged_by_rank_0(ranks, collected, plan, [each.count for each in reports])
        if ranks.size == 1:
            assert merged is not None
            assert images is not None
            return self._compared(images, merged, plan, clock)
        comparison: Comparison | None = None
        failure: BaseException | None = None
        outcome: Outcome | None = None
        if merged is not None and images is not None:
            try:
                comparison = self._compared(images, merged, plan, clock)
                outcome = Outcome(record=comparison.to_json())
            except Exception as error:
                failure, outcome = error, Outcome.of_failure(error, ranks.rank)
        shared = ranks.exchange(outcome)[0]
        if failure is not None:
            raise failure
        return comparison or shared.comparison()

    def propagate_errors(self) -> AbstractContextManager[None]:
        """Propagate an error in this block on one rank to :meth:`compute` on all ranks.

        ::

            with evaluator.propagate_errors():
                for _ in range(10):
                    evaluator.update(model.sample(50))
            comparison = evaluator.compute()

        If sampling fails on one rank, that rank raises its own error. The others raise a
        :class:`~evalkit.errors.WorkerError` with the reason as soon as they call ``compute``; without this
        block, they would wait there until the process group's timeout. Ranks do not communicate before
        ``compute``, so if they wait for each other while they sample, as with FSDP, only the timeout helps.
        """
        return sharing_failure(self._group)

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank, as tensors and plain values.

        ``torch.load`` can read it with ``weights_only=True``. It does not contain the reference's features.
        """
        found = {
            "format": FORMAT,
            "settings": self._settings,
            "passes": dict(self._accumulation.passes),
            "range": [self._intake.low, self._intake.high],
            "values": sorted(self._intake.values),
            "labels": None if self._labels is None else torch.from_numpy(_joined(self._labels)),
            "shape": None if self._shape is None else list(self._shape),
            "dtype": None if self._dtype is None else self._dtype.name,
            "first": torch.from_numpy(self._first_images()),
            "first_batch": self._first_batch,
        }
        features = self._accumulation.state()
        return found | {"features": {key: torch.from_numpy(array) for key, array in features.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by :meth:`state_dict`, in place of all images so far.

        Raises:
            InputError: It has a different format, or comes from an evaluator with different settings.
        """
        if state.get("format") != FORMAT:
            raise InputError(f"This state is not of the format {FORMAT!r}. Give what state_dict() returned.")
        if (state["settings"], state["passes"]) != (self._settings, self._accumulation.passes):
            raise InputError(
                "This state comes from an evaluator with a different reference or different settings: "
                "metrics, networks, weights, batch size, or how floats are converted. Create the evaluator "
                "with the same arguments."
            )
        self.reset()
        self._intake.low, self._intake.high = state["range"]
        self._intake.values = {*state["values"]}
        self._labels = None if state["labels"] is None else [state["labels"].cpu().numpy()]
        self._shape = None if state["shape"] is None else tuple(state["shape"])
        self._dtype = None if state["dtype"] is None else np.dtype(state["dtype"])
        self._first = [state["first"].cpu().numpy()] if len(state["first"]) else []
        self._first_batch = state["first_batch"]
        self._accumulation.restore({key: each.cpu().numpy() for key, each in state["features"].items()})

    # ------------------------------------------------------------------------------------ plan and reference

    @property
    def _settings(self) -> str:
        """All settings that affect which features are kept.

        The reference's pixels do not, so only rank 0 has to read them.
        """
        return json.dumps(
            [
                self._choice.protocol.name,
                [repr(metric) for metric in self._choice.metrics],
                {key: each.fingerprint for key, each in self._extractors.items()},
                self._intake.value_range,
                self._intake.to_bytes,
                len(self._reference),
                self._reference.statistics_digest,
                sorted(file_outputs(self._reference)),
            ]
        )

    def _plan(self, count: int) -> Plan:
        """The features that ``compare`` would keep for this number of images."""
        sources: list[Opened] = [
            self._reference,
            GivenImages(NAME, count, np.empty((0, 1, 1, 3), np.uint8)),
        ]
        return make_plan(
            self._choice.metrics,
            subset=None,
            is_streaming_better=lambda outputs: has_full_rank(sources, self._extractors, outputs),
        )

    def _of_reference(self, plan: Plan, clock: Clock) -> tuple[Side, BatchFeatures]:
        """The reference's features for a plan, extracted once."""
        key = plan.rows, plan.moments
        if key not in self._sides:
            side = Side(self._reference, plan, self._extractors, self._run)
            with clock.stage("features of reference"):
                self._sides[key] = side, side.features()
        return self._sides[key]

    def _compared(self, images: GivenImages, merged: Collected, plan: Plan, clock: Clock) -> Comparison:
        check_sources([images], self._choice)
        reference, known = self._of_reference(plan, clock)
        side = Given(images, plan, self._extractors, self._run)
        features = [known, BatchFeatures.of(*features_from(merged, images, side.wanted))]
        measured = measure_side(self._choice, [reference, side], features, self._error_bars, clock)
        return measured.comparison

    # ------------------------------------------------------------------------------------------------- ranks

    def _reports_of_all(self, ranks: Ranks) -> tuple[Collected, list[RankReport]]:
        """This rank's features, and the metadata of all ranks. All ranks raise the same error."""
        try:
            collected = self._accumulation.collected()
            mine = RankReport(
                count=self._accumulation.count,
                shape=self._shape,
                dtype=None if self._dtype is None else self._dtype.name,
                has_labels=self._labels is not None,
                first=len(self._first_images()),
                first_batch=self._first_batch,
                low=self._intake.low,
                high=self._intake.high,
                values=sorted(self._intake.values),
                settings=self._settings,
            )
        except Exception as error:
            ranks.exchange(RankReport.of_failure(error))
            raise
        reports: list[RankReport] = ranks.exchange(mine)
        check_reports(reports)
        self._intake_of(reports).check(NAME)
        return collected, reports

    def _all_images(self, ranks: Ranks, reports: Sequence[RankReport]) -> GivenImages | None:
        """The metadata of the images of all ranks, on rank 0; None on the others."""
        somewhere = next(each for each in reports if each.count)
        assert somewhere.shape is not None
        first, labels = self._first_images(), None
        if not self._accumulation.count:
            first = np.empty((0, *somewhere.shape), somewhere.dtype)
        found = ranks.gather(first, [each.first for each in reports])
        if somewhere.has_labels:
            labels = ranks.gather(_joined(self._labels or ()), [each.count for each in reports])
        if found is None:
            return None
        count = sum(each.count for each in reports)
        notes = (*self._intake_of(reports).notes(), *notes_on_repeats(reports))
        return GivenImages(NAME, count, found[:MOST], labels, notes)

    def _intake_of(self, reports: Sequence[RankReport]) -> Intake:
        """The value ranges of all ranks, combined."""
        intake = self._new_intake()
        intake.low, intake.high = min(each.low for each in reports), max(each.high for each in reports)
        intake.values = {value for each in reports for value in each.values}
        return intake

    def _first_images(self) -> NDArray[Any]:
        shape, dtype = self._shape or (1, 1, 3), self._dtype or np.uint8
        return np.concatenate([np.empty((0, *shape), dtype), *self._first])


def _joined(labels: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *labels])
