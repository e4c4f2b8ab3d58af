"""torch-fidelity 0.4, whose FID and Inception Score MAR, JiT and others report through a fork of it.

Its precision and recall are not here: they look at VGG16, and those weights are in no package registry. Ask
for ``precision`` under the protocols ``adm`` and ``exact``, which look at Inception: other numbers.
"""

from __future__ import annotations

from dataclasses import replace

from evalkit.metrics.frechet import FID
from evalkit.metrics.inception_score import ShuffledInceptionScore
from evalkit.metrics.kernel import KernelDistance
from evalkit.metrics.kernel_subsets import SubsetKernelDistance
from evalkit.protocols.base import Protocol

__all__ = ["TORCH_FIDELITY"]

TORCH_FIDELITY = Protocol(
    name="torch-fidelity",
    title="torch-fidelity 0.4: Inception Score of shuffled images in ten splits, KID of a hundred subsets",
    citation="Obukhov et al., torch-fidelity, doi:10.5281/zenodo.4957738",
    metrics=(
        replace(FID, mean_dtype="float32"),
        ShuffledInceptionScore(),
        # Where a side has fewer than 1,000 images, torch-fidelity stops; here the subsets are smaller.
        SubsetKernelDistance(scores=KernelDistance.scores),
    ),
    byte_rule="8-bit RGB; images of the network's size are made from any size by TF1's bilinear resize.",
    reference="Images of the dataset, or its mean and covariance.",
)
