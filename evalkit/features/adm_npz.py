"""The statistics of ADM's npz files: ``mu``, ``sigma``, ``mu_s`` and ``sigma_s`` of the Inception network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from evalkit.errors import FeatureError
from evalkit.features.moments import Gaussian, Moments
from evalkit.features.record import Features
from evalkit.images import ImageSource
from evalkit.system.run import library_versions

__all__ = [
    "NETWORK",
    "OUTPUTS",
    "read_gaussians",
    "statistics_of",
    "statistics_record",
    "written_images",
    "written_record",
]

NETWORK = "inception"
OUTPUTS = {"": "pool", "_s": "spatial"}
"""Outputs of the network by the suffix of ``mu`` and ``sigma``."""


def read_gaussians(images: ImageSource, network: str) -> dict[str, Gaussian]:
    """Mean and covariance by output that the file of a batch carries; none for another network.

    Raises:
        FeatureError: They are no mean and covariance.
    """
    found = images.statistics or {}
    if network != NETWORK:
        return {}
    try:
        return {
            output: Gaussian(
                mean=found[f"mu{suffix}"],
                covariance=found[f"sigma{suffix}"],
                n=written_images(images),
            )
            for suffix, output in OUTPUTS.items()
            if f"mu{suffix}" in found
        }
    except FeatureError as error:
        raise FeatureError(f"{images.name}: {error}") from error


def written_record(source: ImageSource | Features) -> Mapping[str, Any]:
    """What a file says of its statistics, where evalkit wrote it: images, extractor, fingerprint."""
    record = (isinstance(source, ImageSource) and source.provenance) or {}
    statistics = record.get("statistics")
    return statistics if isinstance(statistics, Mapping) else {}


def written_images(source: ImageSource | Features) -> int | None:
    """How many images the statistics of a file are of; None where it does not say."""
    count = written_record(source).get("images")
    return count if isinstance(count, int) else None


def statistics_of(features: Features) -> dict[str, NDArray[Any]]:
    """The arrays of a statistics npz: ``mu`` (d,), ``sigma`` (d, d), ``mu_s``, ``sigma_s``.

    Those that are computed are float64.

    Raises:
        UndefinedMetricError: Fewer than two images.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for suffix, output in OUTPUTS.items():
        if output in features.gaussians:
            gaussian = features.gaussians[output]
        elif output in features.arrays:
            gaussian = Moments.of(features.arrays[output]).gaussian()
        else:
            continue  # a file of one pair of statistics, without images
        arrays |= {f"mu{suffix}": gaussian.mean, f"sigma{suffix}": gaussian.covariance}
    return arrays


def statistics_record(features: Features) -> dict[str, Any]:
    """What an npz of :func:`statistics_of` says of itself, under ``provenance``."""
    return {
        "format": "evalkit statistics 1",
        "source": {"name": Path(features.name).name, "digest": features.digest},
        "statistics": {
            "images": len(features),
            "extractor": features.extractor,
            "fingerprint": features.fingerprint,
        },
        "versions": library_versions(),
    }
