"""Statistics stored next to images in files: their network and output, and the statistics of ADM's npz."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from evalkit.errors import FeatureError, brief
from evalkit.features.moments import Gaussian, Moments
from evalkit.features.record import Features, split_output
from evalkit.images import ImageSource
from evalkit.system.run import library_versions

__all__ = [
    "NETWORK",
    "OUTPUTS",
    "outputs_in_file",
    "read_gaussians",
    "statistics_of",
    "statistics_record",
    "written_images",
    "written_preprocess",
    "written_record",
]

NETWORK = "inception"
OUTPUTS = {"": "pool", "_s": "spatial"}
"""Outputs of the network, by suffix of ``mu`` and ``sigma``."""


def outputs_in_file(images: ImageSource) -> dict[str, str]:
    """Outputs (``"network:output"``) whose mean and covariance a file contains, by suffix of ``mu``.

    EDM2's files also have statistics of DINOv2's class token.
    """
    network = images.statistics_network
    every = {
        "": f"{network}:{OUTPUTS['']}",
        "_s": f"{NETWORK}:{OUTPUTS['_s']}",
        "_dinov2": "dinov2_vitl14:class_token",
    }
    there = images.statistics or {}
    return {suffix: output for suffix, output in every.items() if f"mu{suffix}" in there}


def read_gaussians(images: ImageSource, network: str) -> dict[str, Gaussian]:
    """Mean and covariance in a batch's file, by output; empty if they belong to another network.

    Raises:
        FeatureError: The arrays are not a valid mean and covariance.
    """
    found = images.statistics or {}
    outputs = {suffix: split_output(output) for suffix, output in outputs_in_file(images).items()}
    try:
        return {
            output: Gaussian(
                mean=found[f"mu{suffix}"],
                covariance=found[f"sigma{suffix}"],
                n=written_images(images),
            )
            for suffix, (of, output) in outputs.items()
            if of == network
        }
    except FeatureError as error:
        raise FeatureError(f"{images.name}: {error}") from error


def written_record(source: ImageSource | Features) -> Mapping[str, Any]:
    """Provenance of the statistics in a file that evalkit wrote: images, extractor, fingerprint."""
    record = (isinstance(source, ImageSource) and source.provenance) or {}
    statistics = record.get("statistics")
    return statistics if isinstance(statistics, Mapping) else {}


def written_images(source: ImageSource | Features) -> int | None:
    """Number of images behind a file's statistics; None if the file does not say."""
    count = written_record(source).get("images")
    return count if isinstance(count, int) else None


def written_preprocess(source: ImageSource | Features) -> str | None:
    """How the images behind a file's statistics were preprocessed; None if the file does not say."""
    preprocess = written_record(source).get("preprocess")
    return brief(preprocess, 100) if isinstance(preprocess, str) else None


def statistics_of(features: Features) -> dict[str, NDArray[Any]]:
    """The arrays of a statistics npz: ``mu`` (d,), ``sigma`` (d, d), ``mu_s``, ``sigma_s``.

    Computed arrays are float64.

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


def statistics_record(features: Features, preprocess: str) -> dict[str, Any]:
    """The ``provenance`` entry of a statistics file.

    Args:
        features: The features that the statistics were computed from.
        preprocess: Description of the extractor's preprocessing.
    """
    return {
        "format": "evalkit statistics 1",
        "source": {"name": Path(features.name).name, "digest": features.digest},
        "statistics": {
            "images": len(features),
            "extractor": features.extractor,
            "fingerprint": features.fingerprint,
            "preprocess": preprocess,
        },
        "versions": library_versions(),
    }
