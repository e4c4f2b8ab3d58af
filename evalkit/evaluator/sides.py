"""The two sides of an evaluator: the reference, and images of which only the features are kept."""

from __future__ import annotations

from dataclasses import replace

from evalkit.batches import Batch
from evalkit.comparison.sources import Opened, Side, Source, as_published, open_sources
from evalkit.features.record import BatchFeatures
from evalkit.system.run import Run

__all__ = ["Given", "open_reference"]


class Given(Side):
    """The side of the given images, of which only the features are kept."""

    def batch(self, features: BatchFeatures) -> Batch:
        """The record of this side."""
        return replace(super().batch(features), digest="", features="extracted")


def open_reference(reference: Source, run: Run) -> Opened:
    """Open the reference; a string may be the name of a published batch, as on the command line."""
    if isinstance(reference, str):
        from reference_batches.fetch import fetch, named

        if (batch := named(reference)) is not None:
            (opened,) = open_sources(fetch(batch.name, progress=run.progress))
            return as_published(opened, batch.name, getattr(batch, "resize", None))
    (opened,) = open_sources(reference)
    return opened
