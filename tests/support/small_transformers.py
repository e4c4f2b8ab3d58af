"""Vision transformers of a few thousand numbers, in place of those whose weights cannot be had everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evalkit.extractors.vision_transformer import Architecture, VisionTransformer

__all__ = ["random_weights", "shrink", "small"]


def small(architecture: Architecture) -> Architecture:
    """The same network with two narrow blocks; patches and their number stay as they are."""
    projection = None if architecture.projection is None else 8
    return replace(architecture, width=24, depth=2, heads=3, projection=projection)


def random_weights(architecture: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """Weights with which every tensor matters, by timm's names; the same on every machine."""
    random = np.random.default_rng(seed)
    found = {}
    for name, shape in sorted(architecture.shapes.items()):
        values = random.standard_normal(shape)
        if len(shape) > 1 and name != "pos_embed":
            values /= np.sqrt(np.prod(shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            values = 1 + values / 4
        if not name.startswith(("blocks", "norm", "head")):
            values /= 50  # so small that the first norm's epsilon matters
        found[name] = torch.from_numpy(values.astype(np.float32))
    return found


def shrink(cls: type[VisionTransformer], folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Make a class one of a small network, and its weights found; returns their file."""
    patch.setattr(cls, "architecture", small(cls.architecture))
    width = cls.architecture.projection or cls.architecture.width
    patch.setattr(cls, "outputs", dict.fromkeys(cls.outputs, width))
    file = folder / f"{cls.published.name}.safetensors"
    save_file(random_weights(cls.architecture), file)
    patch.setenv(cls.published.variable, str(file))
    return file
