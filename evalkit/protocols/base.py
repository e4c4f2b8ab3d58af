"""What a protocol is."""

from __future__ import annotations

from dataclasses import dataclass

from evalkit.metrics.base import Metric

__all__ = ["Protocol"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a community measures: numbers of one protocol may be compared, of two may not.

    Attributes:
        name: Its row in :data:`evalkit.protocols.PROTOCOLS`.
        title: One line.
        citation: Where it comes from.
        metrics: In the order of tables; each names its network.
        byte_rule: What is done to images that are not 8-bit RGB of the right size.
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
