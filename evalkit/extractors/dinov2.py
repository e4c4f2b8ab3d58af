"""DINOv2: features of a vision transformer that was trained without labels.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (arXiv 2304.07193). The features
are the class token after the last norm, what ``torch.hub.load("facebookresearch/dinov2", ...)`` returns. The
Fréchet distance on them is FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675). EDM2 and dgm-eval resize images
in different ways, so their numbers do not compare: each has a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from evalkit.extractors.bicubic import IMAGENET, Resize, Statistics, squash, squash_as_floats
from evalkit.extractors.vision_transformer import Architecture, VisionTransformer
from evalkit.extractors.vision_weights import DINOV2_LAYOUTS, Published

__all__ = ["DINOv2ViTB14", "DINOv2ViTL14", "DINOv2ViTL14DgmEval"]

ADDRESS = "https://dl.fbaipublicfiles.com/dinov2"


class DINOv2ViTL14(VisionTransformer):
    """DINOv2 ViT-L/14, with images resized as EDM2 does."""

    network: ClassVar[str] = "dinov2_vitl14"
    name: ClassVar[str] = "dinov2-vitl14"
    preprocess: ClassVar[str] = "torch bicubic antialias 224x224, ImageNet mean and std"
    outputs: ClassVar[Mapping[str, int]] = {"class_token": 1024}
    architecture: ClassVar[Architecture] = Architecture(
        width=1024, depth=24, heads=16, patch=14, grid=37, layer_scale=True
    )
    published: ClassVar[Published] = Published(
        name="dinov2_vitl14",
        file="dinov2_vitl14_pretrain.pth",
        url=f"{ADDRESS}/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        repositories=("facebook/dinov2-large", "timm/vit_large_patch14_dinov2.lvd142m"),
        layouts=DINOV2_LAYOUTS,
    )

    resize: ClassVar[Resize] = squash_as_floats
    statistics: ClassVar[Statistics] = IMAGENET


class DINOv2ViTB14(DINOv2ViTL14):
    """DINOv2 ViT-B/14, with images resized as EDM2 does."""

    network: ClassVar[str] = "dinov2_vitb14"
    name: ClassVar[str] = "dinov2-vitb14"
    outputs: ClassVar[Mapping[str, int]] = {"class_token": 768}
    architecture: ClassVar[Architecture] = Architecture(
        width=768, depth=12, heads=12, patch=14, grid=37, layer_scale=True
    )
    published: ClassVar[Published] = Published(
        name="dinov2_vitb14",
        file="dinov2_vitb14_pretrain.pth",
        url=f"{ADDRESS}/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        repositories=("facebook/dinov2-base", "timm/vit_base_patch14_dinov2.lvd142m"),
        layouts=DINOV2_LAYOUTS,
    )


class DINOv2ViTL14DgmEval(DINOv2ViTL14):
    """DINOv2 ViT-L/14, with images resized as dgm-eval does."""

    network: ClassVar[str] = "dinov2_vitl14_dgm_eval"
    preprocess: ClassVar[str] = "Pillow bicubic of bytes 224x224, ImageNet mean and std"
    resize: ClassVar[Resize] = squash
