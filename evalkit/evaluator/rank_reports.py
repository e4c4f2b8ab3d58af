"""Messages that the ranks of a training job exchange when they compute scores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit import errors
from evalkit.comparison.plan import Plan
from evalkit.errors import EvalkitError, InputError, UndefinedMetricError, WorkerError, shortened
from evalkit.features.accumulation import Collected
from evalkit.results import Comparison
from evalkit.system.ranks import Ranks

__all__ = [
    "Outcome",
    "RankReport",
    "check_reports",
    "described",
    "known_to_all",
    "merged_by_rank_0",
    "notes_on_repeats",
    "sharing_failure",
]

KNOWN = "_evalkit_is_known_to_all_ranks"

log = logging.getLogger(__name__)


@contextmanager
def known_to_all() -> Iterator[None]:
    """Mark errors raised in this block as known to all ranks, so that they are not sent again."""
    try:
        yield
    except Exception as error:
        setattr(error, KNOWN, True)
        raise


@contextmanager
def sharing_failure(group: Any) -> Iterator[None]:
    """If this block fails, join the other ranks' first exchange in ``compute``, and send them the error."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, KNOWN):
            report = RankReport.of_failure(error)
            # A failure to notify the others must not hide the error itself.
            with suppress(Exception):
                ranks = Ranks(group)
                if ranks.size > 1:
                    log.error(
                        f"Rank {ranks.rank} failed, and waits until the others call compute(): "
                        f"{report.failure}"
                    )
                ranks.exchange(report)
            setattr(error, KNOWN, True)  # for an enclosing block
        raise


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Metadata of a rank's images that it sends to the others, or its error.

    Attributes:
        first: Number of images kept for the precision check.
        first_batch: Digest of the first batch; empty without images.
    """

    count: int = 0
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    has_labels: bool = False
    first: int = 0
    first_batch: str = ""
    low: float = 0
    high: float = 0
    values: Sequence[int] = ()
    settings: str = ""
    failure: str | None = None

    @classmethod
    def of_failure(cls, error: Exception) -> RankReport:
        """The message of a rank that failed."""
        return cls(failure=shortened(f"{type(error).__name__}: {error}"))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result that rank 0 sends to the others: a record, or an error."""

    record: str = ""
    error: str = ""
    message: str = ""

    @classmethod
    def of_failure(cls, error: Exception, rank: int) -> Outcome:
        """The message if rank 0 failed."""
        if isinstance(error, EvalkitError):
            return cls(error=type(error).__name__, message=str(error))
        return cls(error="WorkerError", message=f"Rank {rank} failed: {type(error).__name__}: {error}")

    def comparison(self) -> Comparison:
        """The comparison.

        Raises:
            EvalkitError: The error of rank 0.
        """
        if self.error:
            raise getattr(errors, self.error, EvalkitError)(self.message)
        return Comparison.from_json(self.record)


def check_reports(reports: Sequence[RankReport]) -> None:
    """Raise the same error on all ranks if a rank failed, or if images or settings do not match."""
    for rank, each in enumerate(reports):
        if each.failure is not None:
            raise WorkerError(f"Rank {rank} failed: {each.failure}")
        if each.settings != reports[0].settings:
            raise InputError(
                f"The evaluator of rank {rank} has a different reference or different settings than that of "
                "rank 0: metrics, networks, weights, or how floats are converted. Create it with the same "
                "arguments on every rank."
            )
    given = [(rank, each) for rank, each in enumerate(reports) if each.count]
    if not given:
        raise UndefinedMetricError("No images were given. Call update(images) before compute().")
    (first, one), *others = given
    for rank, each in others:
        if (each.shape, each.dtype) != (one.shape, one.dtype):
            raise InputError(
                f"The images of rank {rank} are {described(each.shape, each.dtype)}, those of rank {first} "
                f"{described(one.shape, one.dtype)}; expected the same size and type on all ranks."
            )
        if each.has_labels != one.has_labels:
            raise InputError(
                f"Only one of rank {rank} and rank {first} has labels. Give them on all ranks or on none."
            )


def merged_by_rank_0(
    ranks: Ranks, collected: Collected, plan: Plan, counts: Sequence[int]
) -> Collected | None:
    """Merge sums over all ranks, or gather their rows; the result is on rank 0, None on the others."""
    rows: dict[str, dict[str, NDArray[np.float32]]] = {}
    if plan.rows:
        for network, outputs in collected.rows.items():
            for output, mine in outputs.items():
                found = ranks.gather(mine, counts)
                if found is not None:
                    rows.setdefault(network, {})[output] = found
    else:
        for sums in collected.sums.moments.values():
            for output in sums:
                sums[output] = sums[output].across(ranks)
    return Collected(rows, collected.sums) if ranks.rank == 0 else None


def notes_on_repeats(reports: Sequence[RankReport]) -> Iterator[str]:
    """Yield a warning if ranks gave the same images, probably because they share a seed."""
    seen: dict[str, list[int]] = {}
    for rank, each in enumerate(reports):
        if each.count:
            seen.setdefault(each.first_batch, []).append(rank)
    if same := [ranks for ranks in seen.values() if len(ranks) > 1]:
        first, second = same[0][:2]
        count = sum(map(len, same))
        yield (
            f"Ranks {first} and {second} gave the same first batch of images ({count} of {len(reports)} "
            "ranks share theirs with another rank). They may sample with the same seed. Then images are "
            "counted several times, scores are those of fewer images, and error bars are too narrow. Give "
            "each rank its own seed."
        )


def described(shape: Sequence[int] | None, dtype: object) -> str:
    """Size and type of images, for messages."""
    return f"{'x'.join(map(str, shape or ()))} {dtype}"
