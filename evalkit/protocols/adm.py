"""The reference evaluator of ADM, which its published numbers come from."""

from __future__ import annotations

from dataclasses import replace

from evalkit.metrics.frechet import FID, SFID
from evalkit.metrics.inception_score import InceptionScore
from evalkit.metrics.precision_recall import PrecisionRecall
from evalkit.protocols.base import Protocol

__all__ = ["ADM"]

ADM = Protocol(
    name="adm",
    title="the reference evaluator's arithmetic, float16 distances included",
    citation="Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, arXiv 2105.05233",
    metrics=(
        replace(FID, mean_dtype="float32"),
        replace(SFID, mean_dtype="float32"),
        InceptionScore(dtype="float32"),
        PrecisionRecall(arithmetic="float16"),
    ),
    byte_rule="8-bit RGB; images of the network's size are made from any size by TF1's bilinear resize.",
    reference="A batch of images of the dataset at the samples' size, or its mean and covariance.",
)
