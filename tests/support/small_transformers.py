"""Vision networks of a few thousand numbers, in place of those whose weights cannot be had everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evalkit.extractors.convnext import ConvNeXtSizes
from evalkit.extractors.published import PublishedNetwork, Sizes
from evalkit.extractors.vision_transformer import Architecture

T = TypeVar("T", Architecture, ConvNeXtSizes)

__all__ = ["as_timm_names", "random_weights", "shrink", "small"]


def small(architecture: T) -> T:
    """The same network with few narrow blocks; patches and their number stay as they are."""
    if isinstance(architecture, ConvNeXtSizes):
        return replace(architecture, widths=(6, 8, 10, 24), depths=(1, 1, 2, 1))
    projection = None if architecture.projection is None else 8
    hidden = None if architecture.hidden is None else 90
    return replace(architecture, width=24, depth=2, heads=3, projection=projection, hidden=hidden)


def random_weights(architecture: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """Weights with which every tensor matters, by timm's names; the same on every machine."""
    random = np.random.default_rng(seed)
    found = {}
    for name, shape in sorted(architecture.shapes.items()):
        values = random.standard_normal(shape)
        if len(shape) > 1 and name != "pos_embed":
            values /= np.sqrt(np.prod(shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            values = 1 + values / 4
        if not name.startswith(("blocks", "norm", "head", "attn_pool", "stages")):
            values /= 50  # so small that the first norm's epsilon matters
        found[name] = torch.from_numpy(values.astype(np.float32))
    return found


def as_timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of timm's files: they keep the query of SigLIP's pool apart from the rest."""
    found = dict(weights)
    for part in ("weight", "bias"):
        whole = found.pop(f"attn_pool.qkv.{part}", None)
        if whole is not None:
            query, others = whole.tensor_split([len(whole) // 3])
            found |= {f"attn_pool.q.{part}": query.clone(), f"attn_pool.kv.{part}": others.clone()}
    return found


def shrink(cls: type[PublishedNetwork], folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make a class one of a small network, and its weights found; returns their file."""
    architecture: Any = cls.architecture
    patch.setattr(cls, "architecture", small(architecture))
    patch.setattr(cls, "outputs", dict.fromkeys(cls.outputs, small(architecture).features))
    file = folder / f"{cls.published.name}.safetensors"
    save_file(as_timm_names(random_weights(cls.architecture)), file)
    patch.setenv(cls.published.variable, str(file))
    return file
