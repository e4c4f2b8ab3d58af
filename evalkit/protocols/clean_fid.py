"""clean-fid 0.1.35: FID and KID with a resize that does not alias, and its mode ``legacy_pytorch``.

clean-fid draws the subsets of its KID without a seed, so that every run gives another number. These scatter
around the KID of all images, which is the one here.
"""

from __future__ import annotations

from dataclasses import replace

from evalkit.metrics.base import Metric
from evalkit.metrics.frechet import FID
from evalkit.metrics.kernel import KernelDistance
from evalkit.protocols.base import Protocol

__all__ = ["CLEAN_FID", "LEGACY_PYTORCH"]


def _metrics(network: str) -> tuple[Metric, ...]:
    output = f"{network}:pool"
    return replace(FID, output=output, mean_dtype="float32"), KernelDistance(output=output)


CLEAN_FID = Protocol(
    name="clean-fid",
    title="clean-fid 0.1.35, mode clean: FID and KID with Pillow's bicubic resize",
    citation="Parmar, Zhang and Zhu, On Aliased Resizing and Surprising Subtleties in GAN Evaluation, "
    "arXiv 2104.11222",
    metrics=_metrics("inception_clean_fid"),
    byte_rule="8-bit RGB; images of the network's size are made from any size by Pillow's bicubic resize "
    "with antialiasing, of floats that are not rounded.",
    reference="Images of the dataset.",
)

LEGACY_PYTORCH = replace(
    CLEAN_FID,
    name="clean-fid-legacy-pytorch",
    title="clean-fid 0.1.35, mode legacy_pytorch: pytorch-fid's resize",
    metrics=_metrics("inception_clean_fid_legacy_pytorch"),
    byte_rule="8-bit RGB; images of the network's size are made from any size by PyTorch's bilinear resize.",
)
