"""The Inception network behind the resizes of other tools: same weights, other numbers.

Parmar, Zhang and Zhu, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (arXiv 2104.11222),
show how much the resize moves FID.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_network import INPUT_SIZE
from evalkit.extractors.preprocess import resize_bicubic, resize_half_pixel

__all__ = ["CleanFid", "CleanFidLegacyPytorch", "PytorchFid"]


class PytorchFid(Inception):
    """As in pytorch-fid 0.3.0: scaled to [0, 1], then resized as PyTorch does."""

    network: ClassVar[str] = "inception_pytorch_fid"
    name: ClassVar[str] = "inception-2015-12-05 as in pytorch-fid"
    preprocess: ClassVar[str] = "x/255, half-pixel bilinear 299x299 without antialiasing, 2x-1"

    @staticmethod
    def prepared(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See :meth:`Inception.prepared`; the result is in [-1, 1]."""
        return _given(2 * resize_half_pixel(images.float() / 255, INPUT_SIZE) - 1, dtype)


class CleanFid(Inception):
    """As in clean-fid 0.1.35, mode ``clean``: resized as Pillow does, not rounded to bytes."""

    network: ClassVar[str] = "inception_clean_fid"
    name: ClassVar[str] = "inception-2015-12-05 as in clean-fid"
    preprocess: ClassVar[str] = "Pillow bicubic 299x299 on floats, clipped to [0, 255], (x-128)/128"

    @staticmethod
    def prepared(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See :meth:`Inception.prepared`; the result is in [-1, 1)."""
        return _given((resize_bicubic(images, INPUT_SIZE).clamp_(0, 255) - 128) / 128, dtype)


class CleanFidLegacyPytorch(Inception):
    """As in clean-fid 0.1.35, mode ``legacy_pytorch``: pytorch-fid's resize, and scaled after it."""

    network: ClassVar[str] = "inception_clean_fid_legacy_pytorch"
    name: ClassVar[str] = "inception-2015-12-05 as in clean-fid, legacy_pytorch"
    preprocess: ClassVar[str] = "half-pixel bilinear 299x299 without antialiasing, x/255, 2x-1"

    @staticmethod
    def prepared(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See :meth:`Inception.prepared`; the result is in [-1, 1]."""
        return _given(2 * (resize_half_pixel(images.float(), INPUT_SIZE).clamp_(0, 255) / 255) - 1, dtype)


def _given(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the network is fastest with it."""
    return x.to(dtype, memory_format=torch.channels_last)
