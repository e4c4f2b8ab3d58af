"""The networks of FDr6 beside Inception, with the images and features of FD-loss's evaluation.

Yang et al., "Representation Fréchet Loss for Visual Generation" (arXiv 2604.28190), which runs timm's models
(``frechet_distance/repr_models.py``, ``eval_all_fds.py``). Images are cropped to 256 pixels as by ADM, and
resized as floats in [0, 1]. FD-loss runs these networks in bfloat16; this is float32.

DINOv2 and CLIP have patches of 14 pixels. 256 is no multiple of it: timm pads to 266 with zeros, on the right
and below. Its ``vit_large_patch14_clip_224.openai`` has the exact GELU, with which CLIP was not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from numpy.typing import NDArray
from torch import Tensor

from evalkit.extractors.bicubic import (
    CLIP,
    HALF,
    IMAGENET,
    Statistics,
    crop_and_resize_as_floats,
    standardised,
)
from evalkit.extractors.clip import CLIPViTL14
from evalkit.extractors.convnext import ConvNeXtSizes
from evalkit.extractors.dinov2 import DINOv2ViTL14
from evalkit.extractors.published import PublishedNetwork
from evalkit.extractors.vision_transformer import Architecture, VisionTransformer
from evalkit.extractors.vision_weights import (
    CONVNEXTV2_LAYOUTS,
    MAE_LAYOUTS,
    SIGLIP_LAYOUTS,
    Published,
)

__all__ = ["CLIPViTL14FDr6", "ConvNeXtV2Base", "DINOv2ViTL14FDr6", "MAEViTL16", "SigLIP2So400m"]


class _AsFDr6(PublishedNetwork):
    """Its images are prepared as by FD-loss."""

    def prepared(self, images: NDArray[Any]) -> Tensor:
        """See :meth:`PublishedNetwork.prepared`."""
        found = crop_and_resize_as_floats(images, self.input_size, self._device)
        return standardised(found, self.statistics).to(self._device)


class ConvNeXtV2Base(_AsFDr6):
    """ConvNeXt V2 base, trained on ImageNet-22k and then ImageNet-1k."""

    network: ClassVar[str] = "convnextv2_base"
    name: ClassVar[str] = "convnextv2-base"
    preprocess: ClassVar[str] = (
        "ADM's centre crop 256x256, torch bicubic antialias 224x224 of x/255, ImageNet mean and std"
    )
    outputs: ClassVar[Mapping[str, int]] = {"pool": 1024}
    architecture: ClassVar[ConvNeXtSizes] = ConvNeXtSizes(widths=(128, 256, 512, 1024), depths=(3, 3, 27, 3))
    published: ClassVar[Published] = Published(
        name="convnextv2_base",
        file="convnextv2_base.fcmae_ft_in22k_in1k.safetensors",
        url="https://huggingface.co/timm/convnextv2_base.fcmae_ft_in22k_in1k/resolve/main/model.safetensors",
        repositories=("timm/convnextv2_base.fcmae_ft_in22k_in1k", "facebook/convnextv2-base-22k-224"),
        layouts=CONVNEXTV2_LAYOUTS,
    )
    statistics: ClassVar[Statistics] = IMAGENET


class MAEViTL16(_AsFDr6, VisionTransformer):
    """The encoder of MAE, ViT-L/16 (He et al. 2021, arXiv 2111.06377)."""

    network: ClassVar[str] = "mae_vitl16"
    name: ClassVar[str] = "mae-vitl16"
    preprocess: ClassVar[str] = ConvNeXtV2Base.preprocess
    outputs: ClassVar[Mapping[str, int]] = {"class_token": 1024}
    architecture: ClassVar[Architecture] = Architecture(
        width=1024, depth=24, heads=16, patch=16, grid=14, as_timm=True
    )
    published: ClassVar[Published] = Published(
        name="mae_vitl16",
        file="vit_large_patch16_224.mae.safetensors",
        url="https://huggingface.co/timm/vit_large_patch16_224.mae/resolve/main/model.safetensors",
        repositories=("timm/vit_large_patch16_224.mae", "facebook/vit-mae-large"),
        layouts=MAE_LAYOUTS,
    )
    statistics: ClassVar[Statistics] = IMAGENET


class SigLIP2So400m(_AsFDr6, VisionTransformer):
    """SigLIP 2 So400m/16 at 256 pixels (Tschannen et al. 2025, arXiv 2502.14786), given 224 as by FD-loss."""

    network: ClassVar[str] = "siglip2_so400m"
    name: ClassVar[str] = "siglip2-so400m-16-256"
    preprocess: ClassVar[str] = (
        "ADM's centre crop 256x256, torch bicubic antialias 224x224 of x/255, mean and std 0.5"
    )
    outputs: ClassVar[Mapping[str, int]] = {"embedding": 1152}
    architecture: ClassVar[Architecture] = Architecture(
        width=1152, depth=27, heads=16, patch=16, grid=16, hidden=4304, attention_pool=True, as_timm=True
    )
    published: ClassVar[Published] = Published(
        name="siglip2_so400m",
        file="vit_so400m_patch16_siglip_256.v2_webli.safetensors",
        url="https://huggingface.co/timm/vit_so400m_patch16_siglip_256.v2_webli/resolve/main/model.safetensors",
        repositories=(
            "timm/vit_so400m_patch16_siglip_256.v2_webli",
            "google/siglip2-so400m-patch16-256",
        ),
        layouts=SIGLIP_LAYOUTS,
    )
    statistics: ClassVar[Statistics] = HALF


class DINOv2ViTL14FDr6(_AsFDr6, DINOv2ViTL14):
    """DINOv2 ViT-L/14 as timm runs it on images of 256 pixels."""

    network: ClassVar[str] = "dinov2_vitl14_fdr6"
    name: ClassVar[str] = "dinov2-vitl14 as in timm"
    preprocess: ClassVar[str] = (
        "ADM's centre crop 256x256, x/255, ImageNet mean and std, padded with zeros to 266x266"
    )
    architecture: ClassVar[Architecture] = replace(DINOv2ViTL14.architecture, as_timm=True)
    input_size: ClassVar[int] = 256


class CLIPViTL14FDr6(_AsFDr6, CLIPViTL14):
    """CLIP ViT-L/14 as timm runs it on images of 256 pixels: its class token, before the projection."""

    network: ClassVar[str] = "clip_vitl14_fdr6"
    name: ClassVar[str] = "clip-vitl14 as in timm, exact GELU"
    preprocess: ClassVar[str] = (
        "ADM's centre crop 256x256, x/255, CLIP mean and std, padded with zeros to 266x266"
    )
    outputs: ClassVar[Mapping[str, int]] = {"class_token": 1024}
    architecture: ClassVar[Architecture] = replace(CLIPViTL14.architecture, as_timm=True)
    input_size: ClassVar[int] = 256
    statistics: ClassVar[Statistics] = CLIP
