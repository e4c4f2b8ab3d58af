"""EDM2: FID and FD-DINOv2, from moments in float64.

EDM measures FID in the same way.
"""

from __future__ import annotations

from dataclasses import replace

from evalkit.metrics.frechet import FID
from evalkit.protocols.base import Protocol

__all__ = ["EDM2", "FD_DINOV2"]

FD_DINOV2 = replace(
    FID,
    output="dinov2_vitl14:class_token",
    scores=(replace(FID.scores[0], name="fd_dinov2", title="FD-DINOv2"),),
)
"""With EDM2's resize; dgm-eval has another."""

EDM2 = Protocol(
    name="edm2",
    title="EDM2: FID, and FD-DINOv2 of ViT-L/14, with moments in float64",
    citation="Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, "
    "arXiv 2312.02696",
    metrics=(FID, FD_DINOV2),
    byte_rule="8-bit RGB; images of the network's size are made from any size by TF1's bilinear resize for "
    "Inception, and by torch's bicubic resize with antialiasing, of floats, for DINOv2.",
    reference="EDM2's statistics of the dataset (pkl), or images of it.",
)
