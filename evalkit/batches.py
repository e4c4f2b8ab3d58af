"""One side of a comparison, as records describe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Batch", "LabelBalance"]


@dataclass(frozen=True, kw_only=True)
class LabelBalance:
    """How many images each class of a batch has.

    Attributes:
        kind: ``none``: the batch has no labels. ``ids``: they are seeds or ids rather than classes.
            ``balanced``: every class has as many images. ``random``: as if labels were drawn uniformly.
            ``uneven``: anything else.
        classes: Number of classes that occur.
        least: Images of the smallest class.
        most: Images of the largest class.
    """

    kind: Literal["none", "ids", "balanced", "random", "uneven"]
    classes: int = 0
    least: int = 0
    most: int = 0

    def __str__(self) -> str:
        """In words: ``balanced, 1,000 classes of 50 images``."""
        if self.kind in ("none", "ids"):
            return {"none": "no labels", "ids": "ids, not classes"}[self.kind]
        images = f"{self.least:,} to {self.most:,}" if self.least < self.most else f"{self.most:,}"
        return f"{self.kind}, {self.classes:,} class{'es' if self.classes > 1 else ''} of {images} images"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One side of a comparison.

    Attributes:
        name: Path, or ``<array>``.
        images: Number of images whose features were used; 0 where the file holds statistics alone.
        image_shape: (height, width, 3), or None.
        digest: Digest of the images.
        statistics: Where mean and covariance came from: ``images``, or ``file`` (the file's own).
        statistics_images: How many images these are of; None where the file does not say.
        features: ``extracted``, ``stored`` (read back from the store) or ``file`` (a features file).
        statistics_digest: Digest of the statistics that the file has; None where it has none.
        statistics_preprocess: What was done to the images that the file's statistics are of, in words, or
            ``not said``; None where statistics are of the images, or it is not recorded.
        source: ``published NAME`` for a published batch, else path or URL; empty: not recorded.
        labels: How the images spread over classes; None: not recorded.
    """

    name: str
    images: int
    image_shape: tuple[int, ...] | None
    digest: str
    statistics: Literal["images", "file"]
    features: Literal["extracted", "stored", "file"]
    statistics_images: int | None = None
    statistics_digest: str | None = None
    statistics_preprocess: str | None = None
    source: str = ""
    labels: LabelBalance | None = None
