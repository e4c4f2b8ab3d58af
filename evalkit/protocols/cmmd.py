"""CMMD: a kernel distance on CLIP's embeddings of images, times a thousand."""

from __future__ import annotations

from dataclasses import replace

from evalkit.metrics.mmd_rbf import RBFDistance
from evalkit.protocols.base import Protocol

__all__ = ["CMMD"]

CMMD = Protocol(
    name="cmmd",
    title="CMMD: maximum mean discrepancy of CLIP ViT-L/14 embeddings at 336 pixels, times 1,000",
    citation="Jayasumana et al., Rethinking FID: Towards a Better Evaluation Metric for Image Generation, "
    "arXiv 2401.09603",
    metrics=(
        RBFDistance(
            output="clip_vitl14_336:embedding",
            sigma=10.0,
            scores=(replace(RBFDistance.scores[0], name="cmmd", title="CMMD"),),
        ),
    ),
    byte_rule="8-bit RGB; of images of any size the central square is brought to the network's size by "
    "Pillow's bicubic resize of bytes.",
    reference="Images of the dataset.",
    published_images=30_000,
)
