"""The cost of a sampling run, known before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from generation.batch import Networks, schedule_of
from generation.guidance import classifier_gradient
from generation.presets import ModelPreset
from generation.settings import Settings

__all__ = ["describe_cost", "flop", "gradient_flop", "prediction_flop"]


def describe_cost(runs: Sequence[Settings], networks: Networks) -> str:
    """A line about runs of one number of steps: samples, steps, FLOP and gigabytes."""
    size, steps = networks.diffusion.preset.image_size, len(schedule_of(runs[0], networks))
    counts = [settings.count for settings in runs]
    gigabytes, most = (count * size**2 * 3 / 1e9 for count in (sum(counts), sum(counts) + max(counts)))
    petaflop = sum(flop(settings, networks) for settings in runs) / 1e15
    return (
        f"{sum(counts):,} samples of {size}x{size}, {steps} steps each: {petaflop:,.4g} PFLOP, "
        f"{gigabytes:.3g} GB on disk, up to {most:.3g} GB while shards are joined."
    )


def flop(settings: Settings, networks: Networks) -> int:
    """Floating point operations of a run: those of its convolutions, matrix products and attention."""
    timesteps = schedule_of(settings, networks).timesteps
    total = len(timesteps) * prediction_flop(networks.diffusion.preset)
    if networks.classifier is not None and settings.scale:
        first, end = settings.guidance_timesteps or (0, timesteps[-1] + 1)
        guided = int(((timesteps >= first) & (timesteps < end)).sum())
        total += guided * gradient_flop(networks.classifier.preset)
    return settings.count * total


@cache
def prediction_flop(preset: ModelPreset) -> int:
    """FLOP of one forward pass of a diffusion model or upsampler for one image; a multiply-add is two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        inputs: dict[str, Any] = {}
        if preset.num_classes is not None:
            inputs["y"] = torch.zeros(1, dtype=torch.int64)
        if preset.low_res_size is not None:
            inputs["low_res"] = torch.empty(1, 3, preset.low_res_size, preset.low_res_size)
        preset.build().eval()(*_image(preset), **inputs)
    return int(counter.get_total_flops())


@cache
def gradient_flop(preset: ModelPreset) -> int:
    """FLOP of the gradient of a classifier at one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = preset.build().eval().requires_grad_(False)
        # The counter's hooks on a module do not take an input that is a leaf, so it is given a copy.
        classifier_gradient(
            lambda x, t: network(x.clone(), t), *_image(preset), torch.zeros(1, dtype=torch.int64), 1.0
        )
    return int(counter.get_total_flops())


def _image(preset: ModelPreset) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1, 3, preset.image_size, preset.image_size), torch.zeros(1)
