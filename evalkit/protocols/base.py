"""What a protocol is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from evalkit.metrics.base import Metric, scores_at

__all__ = ["Protocol", "side_by_side"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a community measures: numbers of one protocol may be compared, of two may not.

    Attributes:
        name: Its row in :data:`evalkit.protocols.PROTOCOLS`.
        title: One line.
        citation: Where it comes from.
        metrics: In the order of tables; each names its network.
        byte_rule: What is done to images that are not 8-bit RGB of the right size. Records keep these words
            and are compared by them: change them only with the rule.
        reference: What the samples are compared with.
        published_images: Samples behind a published number.
    """

    name: str
    title: str
    citation: str
    metrics: tuple[Metric, ...]
    byte_rule: str
    reference: str
    published_images: int = 50_000


def side_by_side(protocols: Sequence[Protocol]) -> Protocol:
    """Several protocols as one, named ``first,second``, so that one pass over the files serves them all.

    The scores of the first keep their names, those of the others are called ``score@protocol``.
    """
    first, *others = protocols

    def all_of(attribute: str, between: str) -> str:
        return between.join(dict.fromkeys(getattr(each, attribute) for each in protocols))

    return Protocol(
        name=all_of("name", ","),
        title=all_of("title", "; "),
        citation=all_of("citation", "; "),
        metrics=first.metrics + tuple(_of(metric, other) for other in others for metric in other.metrics),
        byte_rule=all_of("byte_rule", " "),
        reference=all_of("reference", " "),
        published_images=max(each.published_images for each in protocols),
    )


def _of(metric: Any, protocol: Protocol) -> Metric:
    named: Metric = replace(metric, scores=scores_at(metric.scores, protocol.name))
    return named
