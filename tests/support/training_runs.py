"""A recipe for a small network, and images for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from generation.recipe import Recipe, load_recipe

RECIPE = """
[model]
name = "small"
kind = "diffusion"
noise_schedule = "cosine"

[model.network]
image_size = 8
model_channels = 32
out_channels = 6
num_res_blocks = 1
attention_resolutions = [2]
channel_mult = [1, 1]
num_classes = 3
num_head_channels = 16

[training]
steps = 4
batch_size = 8
learning_rate = 1e-3
ema = 0.9
"""


CLASSIFIER = RECIPE.replace('"diffusion"', '"classifier"').replace("out_channels = 6", "out_channels = 3")


CLASSIFIER = CLASSIFIER.replace("num_classes = 3\n", "")


RNG = np.random.default_rng(0)


IMAGES = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


LABELS = np.arange(20) % 3


def write(folder: Path, images: NDArray[np.uint8] = IMAGES, **arrays: NDArray[Any]) -> str:
    path = folder / "images.npz"
    np.savez(path, arr_0=images, **(arrays or {"arr_1": LABELS}))
    return str(path)


def recipe(folder: Path, text: str = RECIPE, **changes: Any) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, **changes)


def with_network(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, model=replace(recipe.model, network=replace(recipe.model.network, **changes)))
