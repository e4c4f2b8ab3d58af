"""CLIP: embeddings of images, from networks that were trained with captions.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020),
with OpenAI's weights. The features are the image embeddings as ``encode_image`` returns them, before they are
brought to length 1. OpenAI's code runs in float16 on a GPU; this is float32.

Images are resized as by CLIP's own code and clean-fid, and for ViT-L/14 at 336 pixels as by CMMD.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from evalkit.extractors.bicubic import CLIP, Resize, Statistics, crop_and_resize, resize_and_crop
from evalkit.extractors.vision_transformer import Architecture, VisionTransformer
from evalkit.extractors.vision_weights import CLIP_LAYOUTS, Published

__all__ = ["CLIPViTB32", "CLIPViTL14", "CLIPViTL14At336"]


class CLIPViTB32(VisionTransformer):
    """CLIP ViT-B/32."""

    network: ClassVar[str] = "clip_vitb32"
    name: ClassVar[str] = "clip-vitb32"
    preprocess: ClassVar[str] = "Pillow bicubic of bytes, shorter side 224, centre crop, CLIP mean and std"
    outputs: ClassVar[Mapping[str, int]] = {"embedding": 512}
    architecture: ClassVar[Architecture] = Architecture(
        width=768, depth=12, heads=12, patch=32, grid=7, projection=512
    )
    published: ClassVar[Published] = Published(
        name="clip_vitb32",
        file="clip-vit-base-patch32.bin",
        url="https://huggingface.co/openai/clip-vit-base-patch32/resolve/main/pytorch_model.bin",
        repositories=("openai/clip-vit-base-patch32", "timm/vit_base_patch32_clip_224.openai"),
        layouts=CLIP_LAYOUTS,
    )

    resize: ClassVar[Resize] = resize_and_crop
    statistics: ClassVar[Statistics] = CLIP


class CLIPViTL14(CLIPViTB32):
    """CLIP ViT-L/14."""

    network: ClassVar[str] = "clip_vitl14"
    name: ClassVar[str] = "clip-vitl14"
    outputs: ClassVar[Mapping[str, int]] = {"embedding": 768}
    architecture: ClassVar[Architecture] = Architecture(
        width=1024, depth=24, heads=16, patch=14, grid=16, projection=768
    )
    published: ClassVar[Published] = Published(
        name="clip_vitl14",
        file="clip-vit-large-patch14.bin",
        url="https://huggingface.co/openai/clip-vit-large-patch14/resolve/main/pytorch_model.bin",
        repositories=("openai/clip-vit-large-patch14", "timm/vit_large_patch14_clip_224.openai"),
        layouts=CLIP_LAYOUTS,
    )


class CLIPViTL14At336(VisionTransformer):
    """CLIP ViT-L/14 at 336 pixels."""

    network: ClassVar[str] = "clip_vitl14_336"
    name: ClassVar[str] = "clip-vitl14-336"
    preprocess: ClassVar[str] = "centre crop, Pillow bicubic of bytes 336x336, CLIP mean and std"
    outputs: ClassVar[Mapping[str, int]] = {"embedding": 768}
    architecture: ClassVar[Architecture] = replace(CLIPViTL14.architecture, grid=24)
    published: ClassVar[Published] = Published(
        name="clip_vitl14_336",
        file="clip-vit-large-patch14-336.bin",
        url="https://huggingface.co/openai/clip-vit-large-patch14-336/resolve/main/pytorch_model.bin",
        repositories=("openai/clip-vit-large-patch14-336", "timm/vit_large_patch14_clip_336.openai"),
        layouts=CLIP_LAYOUTS,
    )
    input_size: ClassVar[int] = 336
    resize: ClassVar[Resize] = crop_and_resize
    statistics: ClassVar[Statistics] = CLIP
