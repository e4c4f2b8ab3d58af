"""Weights of vision networks: where they are looked for, and the ways in which they are published.

The same tensors go by several sets of names: those of the authors (torch.hub's for DINOv2, OpenAI's and
open_clip's for CLIP), of timm and of transformers. Here they have timm's, and a digest that is the same for
all. Files hold tensors alone: PyTorch's are read with ``weights_only=True``, safetensors as they are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from evalkit.errors import DownloadError, InputError, OutputError, WeightsError, brief, listing
from evalkit.extractors.base import WeightsState
from evalkit.system.download import download
from evalkit.system.files import (
    cache_directory,
    expand_user,
    tensor_digest,
    torch_hub_checkpoints,
    xdg_cache_home,
)
from evalkit.system.tensor_files import read_tensors
from evalkit.system.urls import is_offline

__all__ = [
    "CLIP_LAYOUTS",
    "CONVNEXTV2_LAYOUTS",
    "DINOV2_LAYOUTS",
    "MAE_LAYOUTS",
    "SIGLIP_LAYOUTS",
    "Published",
    "Weights",
    "find_weights",
    "read_weights",
    "weights_state",
]

log = logging.getLogger(__name__)

MOST_BYTES = 4 * 1024**3
"""CLIP ViT-L/14 with its text encoder has 1.7 GB."""

HUB_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


@dataclass(frozen=True)
class Layout:
    """How one library calls the tensors.

    Attributes:
        name: Of the library.
        renames: Patterns in timm's names, each with what replaces it, in this order.
        parts: What takes the place of ``{}`` where a tensor is kept in parts: query, key and value.
        transposed: timm's name of a matrix that is kept transposed.
        prefix: What the names of the image encoder begin with, where the file holds more.
        ignored: Names of tensors that features do not depend on.
    """

    name: str
    renames: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    transposed: str = ""
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    def names(self, name: str) -> list[str]:
        """The library's name for timm's: one, or those of its parts."""
        for pattern, new in self.renames.items():
            name = re.sub(pattern, new, name)
        return [name.format(part) for part in self.parts] if "{}" in name else [name]

    def read(self, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
        """The tensor that timm calls so; None if it, or a part of it, is not there."""
        parts = [tensors[each] for each in self.names(name) if each in tensors]
        if len(parts) < len(self.names(name)) or len({part.shape[1:] for part in parts}) > 1:
            return None
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole.T if name == self.transposed else whole

    def unused(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
        """The tensors of the image encoder that are none of these, of timm's names, and not all zero."""
        used = {*self.ignored, *(each for name in names for each in self.names(name))}
        return [
            name
            for name, tensor in tensors.items()
            if name.startswith(self.prefix) and name not in used and bool(tensor.any())
        ]


DINOV2_LAYOUTS = (
    Layout("torch.hub or timm", ignored=("mask_token",)),
    Layout(
        "transformers",
        {
            "^cls_token": "embeddings.cls_token",
            "^pos_embed": "embeddings.position_embeddings",
            "^patch_embed.proj": "embeddings.patch_embeddings.projection",
            "^blocks": "encoder.layer",
            r"\.attn.qkv": ".attention.attention.{}",
            r"\.attn.proj": ".attention.output.dense",
            r"\.ls(.).gamma": r".layer_scale\1.lambda1",
            "^norm": "layernorm",
        },
        parts=("query", "key", "value"),
        ignored=("embeddings.mask_token",),
    ),
)
CLIP_LAYOUTS = (
    Layout(
        "OpenAI or open_clip",
        {
            "^cls_token": "visual.class_embedding",
            "^pos_embed": "visual.positional_embedding",
            "^patch_embed.proj": "visual.conv1",
            "^norm_pre": "visual.ln_pre",
            "^blocks": "visual.transformer.resblocks",
            r"\.norm(.)": r".ln_\1",
            r"\.attn.qkv.": ".attn.in_proj_",
            r"\.attn.proj": ".attn.out_proj",
            r"\.mlp.fc1": ".mlp.c_fc",
            r"\.mlp.fc2": ".mlp.c_proj",
            "^norm": "visual.ln_post",
            "^head.weight": "visual.proj",
        },
        transposed="head.weight",
        prefix="visual.",
    ),
    Layout("timm"),
    Layout(
        "transformers",
        {
            "^cls_token": "vision_model.embeddings.class_embedding",
            "^pos_embed": "vision_model.embeddings.position_embedding.weight",
            "^patch_embed.proj": "vision_model.embeddings.patch_embedding",
            "^norm_pre": "vision_model.pre_layrnorm",
            "^blocks": "vision_model.encoder.layers",
            r"\.norm(.)": r".layer_norm\1",
            r"\.attn.qkv": ".self_attn.{}_proj",
            r"\.attn.proj": ".self_attn.out_proj",
            "^norm": "vision_model.post_layernorm",
            "^head.weight": "visual_projection.weight",
        },
        parts=("q", "k", "v"),
        prefix="vision_model.",
        ignored=("vision_model.embeddings.position_ids",),
    ),
)
MAE_LAYOUTS = (
    Layout("timm"),
    Layout(
        "transformers",
        {
            "^cls_token": "vit.embeddings.cls_token",
            "^pos_embed": "vit.embeddings.position_embeddings",
            "^patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
            "^blocks": "vit.encoder.layer",
            r"\.norm1": ".layernorm_before",
            r"\.norm2": ".layernorm_after",
            r"\.attn.qkv": ".attention.attention.{}",
            r"\.attn.proj": ".attention.output.dense",
            r"\.mlp.fc1": ".intermediate.dense",
            r"\.mlp.fc2": ".output.dense",
            "^norm": "vit.layernorm",
        },
        parts=("query", "key", "value"),
        prefix="vit.",
    ),
)
SIGLIP_LAYOUTS = (
    Layout("timm", {"^attn_pool.qkv": "attn_pool.{}"}, parts=("q", "kv")),
    Layout(
        "transformers",
        {
            "^pos_embed": "vision_model.embeddings.position_embedding.weight",
            "^patch_embed.proj": "vision_model.embeddings.patch_embedding",
            "^attn_pool.latent": "vision_model.head.probe",
            "^attn_pool.qkv.": "vision_model.head.attention.in_proj_",
            "^attn_pool.proj": "vision_model.head.attention.out_proj",
            "^attn_pool.norm": "vision_model.head.layernorm",
            "^attn_pool.mlp": "vision_model.head.mlp",
            "^blocks": "vision_model.encoder.layers",
            r"\.norm(\d)": r".layer_norm\1",
            r"\.attn.qkv": ".self_attn.{}_proj",
            r"\.attn.proj": ".self_attn.out_proj",
            "^norm": "vision_model.post_layernorm",
        },
        parts=("q", "k", "v"),
        prefix="vision_model.",
        ignored=("vision_model.embeddings.position_ids",),
    ),
)
CONVNEXTV2_LAYOUTS = (
    # The classifier comes after the features.
    Layout("timm", ignored=("head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias")),
    Layout(
        "transformers",
        {
            "^stem.0": "convnextv2.embeddings.patch_embeddings",
            "^stem.1": "convnextv2.embeddings.layernorm",
            "^stages": "convnextv2.encoder.stages",
            r"\.downsample": ".downsampling_layer",
            r"\.blocks": ".layers",
            r"\.conv_dw": ".dwconv",
            r"\.norm": ".layernorm",
            r"\.mlp.fc1": ".pwconv1",
            r"\.mlp.grn": ".grn",
            r"\.mlp.fc2": ".pwconv2",
        },
        prefix="convnextv2.",
        ignored=("convnextv2.layernorm.weight", "convnextv2.layernorm.bias"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where the weights of one network are published.

    Attributes:
        name: Of the weights; several rows of EXTRACTORS may share them.
        file: Name of the file in evalkit's cache, and in torch.hub's.
        url: Address of the file.
        repositories: On the Hugging Face hub; a copy in its cache is used.
        layouts: The names that the tensors may have.
    """

    name: str
    file: str
    url: str
    repositories: tuple[str, ...]
    layouts: tuple[Layout, ...]

    @property
    def variable(self) -> str:
        """The environment variable that names a file."""
        return f"EVALKIT_WEIGHTS_{self.name.upper()}"


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights as read from one file.

    Attributes:
        tensors: float32, by timm's names, on the CPU.
        source: Path of the file.
        layout: Whose names it uses.
        digest: ``tensor_digest`` of the tensors, the same in every layout.
    """

    tensors: dict[str, Tensor]
    source: str
    layout: str
    digest: str


def find_weights(published: Published, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Find a file of weights, or download it.

    The order: the file that :attr:`Published.variable` names; the caches of evalkit, of torch.hub and of the
    Hugging Face hub; a download, unless ``EVALKIT_OFFLINE`` forbids it.

    Args:
        published: Which weights.
        shapes: The tensors that the network needs, by timm's names; a download is checked for them.

    Raises:
        WeightsError: There are none.
        OutputError: A download cannot be written to the cache.
    """
    if chosen := os.environ.get(published.variable):
        return expand_user(chosen)
    own = _own_place(published)
    for place in (own, *_other_caches(published)):
        if place.is_file():
            return place
    failure = "no download was tried, as EVALKIT_OFFLINE is set"
    if not is_offline():
        log.info("Downloading the weights of %s from %s", published.name, published.url)
        try:
            download(
                [published.url],
                own,
                max_bytes=MOST_BYTES,
                timeout=10.0,
                attempts=2,
                check=lambda path: read_weights(path, published, shapes),
            )
            return own
        except DownloadError as error:
            failure = brief(error, 300)
    raise WeightsError(
        f"No weights of {published.name} found; {failure}. Download {published.url} and save it as {own}, "
        f"or set {published.variable} to the path of a copy. The caches of torch.hub and of the Hugging Face "
        f"hub ({' and '.join(published.repositories)}) were searched."
    )


def weights_state(published: Published) -> WeightsState:
    """Where :func:`find_weights` would find them; their values are not read, which can take a minute."""
    own, chosen = _own_place(published), os.environ.get(published.variable)
    places = [expand_user(chosen)] if chosen else [own, *_other_caches(published)]
    file = next((place for place in places if place.is_file()), None)
    bring = f"curl --location --create-dirs --output {shlex.quote(str(own))} {published.url}"
    if file is None and chosen:
        return WeightsState(usable=False, detail=f"{published.variable}: {chosen} is no file")
    if file is None:
        return WeightsState(usable=None, detail="not on this machine; downloaded at first use", remedy=bring)
    try:
        read_tensors(file, f"{published.url} is one")
    except InputError as error:
        return WeightsState(usable=False, detail=str(error), remedy="" if chosen else bring)
    return WeightsState(
        usable=True, detail=f"{file}, {file.stat().st_size / 1e9:.2f} GB, checked at first use"
    )


def _own_place(published: Published) -> Path:
    return cache_directory() / "weights" / published.file


def _other_caches(published: Published) -> Iterator[Path]:
    with contextlib.suppress(OutputError):  # a user without a home folder has none
        yield torch_hub_checkpoints() / published.file
        hub_home = expand_user(os.environ.get("HF_HOME") or xdg_cache_home() / "huggingface")
        hub = expand_user(os.environ.get("HF_HUB_CACHE") or hub_home / "hub")
        for repository in published.repositories:
            folder = hub / f"models--{repository.replace('/', '--')}" / "snapshots"
            for name in HUB_FILES:
                yield from sorted(folder.glob(f"*/{name}"))


def read_weights(file: Path, published: Published, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Read a file of weights in any of the layouts; it must have all tensors, in the right shapes.

    Args:
        file: PyTorch's or safetensors. What it holds beside the image encoder is ignored.
        published: What it should be.
        shapes: The tensors that the network needs, by timm's names.

    Raises:
        WeightsError: There is no such file, or it holds something else.
    """
    names = " or ".join(layout.name for layout in published.layouts)
    expected = (
        f"Expected the weights of {published.name} with the tensor names of {names}, such as {published.url}."
    )
    try:
        content = read_tensors(file, f"{published.url} is one").content
    except InputError as error:
        raise WeightsError(f"Weights of {published.name}: {error}") from error
    tensors = {
        name: tensor
        for name, tensor in (content.items() if isinstance(content, dict) else ())
        if isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
    }
    first = next(iter(shapes))
    layout = next((each for each in published.layouts if each.names(first)[0] in tensors), None)
    if layout is None:
        raise WeightsError(f"{file} holds other tensors, or none. {expected}")
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = layout.read(tensors, name)
        shown = layout.names(name)[0]
        if tensor is None or not tensor.is_floating_point():
            raise WeightsError(f"{file} lacks {shown}. {expected}")
        if _without_ones(tensor.shape) != _without_ones(shape):
            raise WeightsError(
                f"{file} is of another network: the shape of {shown} is {brief(tuple(tensor.shape))}, "
                f"expected {shape}. {expected}"
            )
        # A copy: the file is mapped into memory, and may change.
        found[name] = tensor.detach().to(torch.float32, copy=True).reshape(shape).contiguous()
    if unused := layout.unused(tensors, shapes):
        raise WeightsError(
            f"{file} is of another network: it also holds {listing(unused, 3)}, which {published.name} does "
            f"not have. {expected}"
        )
    digest = tensor_digest({name: tensor.numpy() for name, tensor in found.items()})
    return Weights(tensors=found, source=str(file), layout=layout.name, digest=digest)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]
