"""pytorch-fid 0.3, the FID of many papers since 2018: PyTorch's resize in place of TensorFlow's."""

from __future__ import annotations

from dataclasses import replace

from evalkit.metrics.frechet import FID
from evalkit.protocols.base import Protocol

__all__ = ["PYTORCH_FID"]

PYTORCH_FID = Protocol(
    name="pytorch-fid",
    title="pytorch-fid 0.3: FID with PyTorch's bilinear resize",
    citation="Seitzer, pytorch-fid: FID Score for PyTorch, version 0.3.0, 2020",
    metrics=(replace(FID, output="inception_pytorch_fid:pool"),),
    byte_rule="8-bit RGB; images of the network's size are made from any size by PyTorch's bilinear resize.",
    reference="Images of the dataset.",
)
