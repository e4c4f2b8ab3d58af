"""FDr6 of FD-loss: the mean over six networks, and the ratio of each.

FD-loss runs all networks but Inception in bfloat16; evalkit runs them in float32. The published distance of
the validation images on MAE is rounded to 0.04, so its ratio is known to within 12 % only.
"""

from __future__ import annotations

from evalkit.metrics.fdr6 import FDr6
from evalkit.protocols.base import Protocol

__all__ = ["FDR6"]

FDR6 = Protocol(
    name="fdr6",
    title="FDr6: mean over six networks of the Fréchet distance over that of ImageNet's validation images",
    citation="Yang et al., Representation Fréchet Loss for Visual Generation, arXiv 2604.28190",
    metrics=(FDr6(),),
    byte_rule="8-bit RGB of 256 pixels; others get ADM's centre crop, except for Inception. Images of the "
    "networks' sizes are made by TF1's bilinear resize for Inception, and by torch's bicubic resize with "
    "antialiasing, of floats, for the others.",
    reference="All training images of ImageNet, with ADM's centre crop to 256 pixels; ratios of other "
    "datasets mean nothing.",
)
