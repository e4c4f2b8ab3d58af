"""One side of a comparison, as records describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        images: Number of images whose features were used; 0 if the file has only statistics.
        image_shape: (height, width, 3), or None.
        digest: Digest of the images.
        statistics: Where mean and covariance came from: ``images``, or ``file`` (the file's own).
        statistics_images: Number of images behind them; None if the file does not say.
        features: ``extracted``, ``stored`` (read back from the store) or ``file`` (a features file).
        statistics_digest: Digest of all statistics in the file, which depends on the file type; None if it
            has none.
        output_digests: Digests, by output such as ``inception:pool``, of the mean, covariance and number of
            images in the file, independent of the file type. Empty if there are none, or not recorded.
        statistics_preprocess: How the images behind the file's statistics were preprocessed, in words, or
            ``not said``; None if statistics were computed from the images, or not recorded.
        extracted_by: The other tool that extracted the features in the file; empty for evalkit, or if not
            recorded.
        source: ``published NAME`` for a published batch, else path or URL; empty if not recorded.
        labels: Distribution of the images over classes; None if not recorded.
    """

    name: str
    images: int
    image_shape: tuple[int, ...] | None
    digest: str
    statistics: Literal["images", "file"]
    features: Literal["extracted", "stored", "file"]
    statistics_images: int | None = None
    statistics_digest: str | None = None
    output_digests: Mapping[str, str] = field(default_factory=dict, hash=False)
    statistics_preprocess: str | None = None
    extracted_by: str = ""
    source: str = ""
    labels: LabelBalance | None = None
