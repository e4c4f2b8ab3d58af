"""dgm-eval: FD-DINOv2 and what else the tool reports of DINOv2's features, as far as one reference gives it.

Where the tool draws images without a seed, evalkit draws them with one, so that the same sets give the same
scores: KD's subsets as torch-fidelity does, and for neighbours 10,000 images by a digest of their features.
The tool's own numbers scatter around these from run to run. Its Vendi score is the mean over classes; here it
is that of all samples, as in the paper. Its C_T takes a third set of held-out images; here half of the
reference stands for them. Its Inception Score looks at the images of another path than it says, and its FD
at infinity is a fit to subsets drawn without a seed: neither is here. The error bars' ``unbiased`` value is
the FD of infinitely many images.
"""

from __future__ import annotations

from dataclasses import replace

from evalkit.metrics.authenticity import AuthPct
from evalkit.metrics.data_copying import DataCopying
from evalkit.metrics.kernel_subsets import SubsetKernelDistance
from evalkit.metrics.prdc import DrawnDensityCoverage, StrictPrecisionRecall
from evalkit.metrics.vendi import Vendi
from evalkit.protocols.base import Protocol
from evalkit.protocols.edm2 import FD_DINOV2

__all__ = ["DGM_EVAL"]

FEATURES = "dinov2_vitl14_dgm_eval:class_token"

DGM_EVAL = Protocol(
    name="dgm-eval",
    title="dgm-eval: FD-DINOv2, KD, precision, recall, density, coverage, and tests for copies",
    citation="Stein et al., Exposing flaws of generative model evaluation metrics and their unfair treatment "
    "of diffusion models, arXiv 2306.04675",
    metrics=(
        replace(FD_DINOV2, output=FEATURES),
        SubsetKernelDistance(
            output=FEATURES,
            scores=(replace(SubsetKernelDistance.scores[0], name="kd", title="KD"),),
        ),
        StrictPrecisionRecall(output=FEATURES),
        DrawnDensityCoverage(output=FEATURES),
        Vendi(output=FEATURES),
        AuthPct(output=FEATURES),
        DataCopying(output=FEATURES),
    ),
    byte_rule="8-bit RGB; images of the network's size are made from any size by Pillow's bicubic resize of "
    "bytes, whatever their shape.",
    reference="Images of the training set; the tool takes 50,000 where there are more.",
)
