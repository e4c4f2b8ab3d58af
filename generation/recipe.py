"""What is trained and how: a recipe is a TOML file with a network and the settings of its training."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from evalkit.errors import InputError, brief, did_you_mean
from evalkit.system.files import read_text
from evalkit.system.records import structure
from generation.losses import TIMESTEP_SAMPLERS
from generation.presets import ModelPreset, find_model

__all__ = ["SHIPPED", "Recipe", "Settings", "load_recipe"]

Precision = Literal["float32", "bfloat16"]

MOST_STEPS = 100_000
"""Timesteps of a noise schedule; published models have 1,000 or 4,000."""

SHIPPED = Path(__file__).parent / "models"
"""The folder of the models that come with the package: recipes, and the weights that they gave."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a training run, beside the network and the images.

    Attributes:
        steps: Updates of the weights.
        batch_size: Images an update, of all processes together.
        learning_rate: Learning rate of AdamW.
        anneal: Lower the learning rate along a line that ends at 0 after the last step; else it is constant.
        weight_decay: Weight decay of AdamW.
        ema: Decay of the averaged weights, at most; early updates use less, so that the random start is
            soon forgotten.
        timesteps: ``uniform``, or ``loss-second-moment``, see :mod:`generation.losses`.
        flip: Mirror every second image.
        crop: Random crops of at least 80% of the side, as the ADM classifiers were trained with.
        precision: ``bfloat16`` computes convolutions and matrix products in it; weights, optimiser and
            average stay float32.
        seed: From 0 to 2^64 - 1.

    Raises:
        InputError: A value is out of range.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-4
    anneal: bool = False
    weight_decay: float = 0.0
    ema: float = 0.9999
    timesteps: str = "uniform"
    flip: bool = False
    crop: bool = False
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for good, what in (
            (0 < self.steps < 2**32, f"{self.steps} steps; expected a number from 1"),
            (0 < self.batch_size < 2**32, f"batch_size {self.batch_size}; expected a number from 1"),
            (
                0 < self.learning_rate < math.inf,
                f"learning_rate {self.learning_rate}; expected a positive number",
            ),
            (0 <= self.weight_decay < math.inf, f"weight_decay {self.weight_decay}; expected 0 or more"),
            (0 <= self.ema < 1, f"ema {self.ema}; expected 0 to 1, without 1"),
            (
                self.timesteps in TIMESTEP_SAMPLERS,
                f"timesteps {self.timesteps!r}; expected {' or '.join(TIMESTEP_SAMPLERS)}",
            ),
            (
                self.precision in get_args(Precision),
                f"precision {self.precision!r}; expected {' or '.join(get_args(Precision))}",
            ),
            (0 <= self.seed < 2**64, f"seed {self.seed}; expected 0 to 2^64 - 1"),
        ):
            if not good:
                raise InputError(f"Cannot train with {what}.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network and the settings of its training.

    Attributes:
        model: What is trained, a diffusion model or a classifier.
        settings: How it is trained.

    Raises:
        InputError: The model is of another kind, predicts something else than the noise, or is for images
            that are not RGB.
    """

    model: ModelPreset
    settings: Settings

    def __post_init__(self) -> None:
        model, network = self.model, self.model.network
        outputs = (3, 6) if model.kind == "diffusion" else (network.out_channels,)
        for good, what in (
            (model.kind != "upsampler", "an upsampler; expected a diffusion model or classifier"),
            (model.prediction == "eps", f"prediction {model.prediction}; training is of eps alone"),
            (network.in_channels == 3, f"in_channels {network.in_channels}; images have 3"),
            (
                network.out_channels in outputs,
                f"out_channels {network.out_channels}; a diffusion model has 3, or 6 with the variance",
            ),
            (
                re.fullmatch(r"\w[\w.+-]{,99}", model.name) is not None,
                "that name, which its file gets; expected up to 100 letters, digits and . _ + -",
            ),
            (
                1 < model.diffusion_steps <= MOST_STEPS,
                f"{model.diffusion_steps} timesteps; expected 2 to {MOST_STEPS}",
            ),
        ):
            if not good:
                raise InputError(f"Cannot train {brief(model.name) or 'a model without a name'} with {what}.")


def load_recipe(name: str | Path, **changes: Any) -> Recipe:
    """Read a recipe.

    The file has a table ``training`` with the fields of :class:`Settings`, and ``model``: the name of a
    published checkpoint, or a table with the fields of :class:`generation.presets.ModelPreset`.

    Args:
        name: Name of a shipped recipe, or path of a file.
        **changes: Settings to use instead of the recipe's; None leaves them.

    Raises:
        InputError: There is no such recipe, or it is not understood.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    path = shipped.get(str(name), Path(name))
    try:
        content = tomllib.loads(read_text(path))
    except OSError as error:
        raise InputError(
            f"There is no recipe {str(name)!r} ({error.strerror}). Give a file, or one of "
            f"{', '.join(shipped)}.{did_you_mean(name, shipped)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    try:
        model = content.get("model")
        preset = find_model(model) if isinstance(model, str) else ModelPreset.from_table(model, "model")
        settings = structure(content.get("training"), Settings, "training")
        recipe = Recipe(model=preset, settings=settings)
    except InputError as error:
        raise InputError(
            f"{path} is not understood as a recipe: {error} Those in {SHIPPED} show what one has."
        ) from error
    changed = {key: value for key, value in changes.items() if value is not None}
    return replace(recipe, settings=replace(settings, **changed))
