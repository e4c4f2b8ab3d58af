"""The noisy-image classifier of ADM: the descending half of the UNet, and a pooling.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), section 4 and
appendix I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from evalkit.errors import InputError
from generation.networks.layers import AttentionPool, GroupNorm, zeroed
from generation.networks.unet import Trunk, UNetSettings

__all__ = ["Classifier", "ClassifierSettings"]

SPATIAL_WIDTH = 2048


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(UNetSettings):
    """Everything that determines a classifier: a UNet's settings, with the classes as ``out_channels``.

    Attributes:
        pool: From feature map to logits: ``attention`` as in all published classifiers; ``adaptive``, the
            mean over positions; ``spatial`` and ``spatial_v2``, the means of every block's output through
            two layers, without and with a group norm between them.
    """

    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"


class Classifier(Trunk):
    """Logits of the class of a noisy image.

    State-dict keys, shapes and order are those of the published checkpoints.

    Args:
        settings: Everything that determines it.

    Raises:
        InputError: An unknown pooling, or attention pooling without ``num_head_channels``.
    """

    def __init__(self, settings: ClassifierSettings):
        super().__init__(settings, settings.in_channels)
        self.pool = settings.pool
        channels, classes = settings.widths[-1], settings.out_channels
        if settings.pool == "attention":
            if settings.num_head_channels is None:
                raise InputError("Attention pooling needs num_head_channels; the published models have 64.")
            size = settings.image_size // 2 ** (len(settings.widths) - 1)
            pooling = AttentionPool(size, channels, settings.num_head_channels, classes)
            self.out = nn.Sequential(GroupNorm(channels), nn.SiLU(), pooling)
        elif settings.pool == "adaptive":
            self.out = nn.Sequential(
                GroupNorm(channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d((1, 1)),
                zeroed(nn.Conv2d(channels, classes, 1)),
                nn.Flatten(),
            )
        elif settings.pool in ("spatial", "spatial_v2"):
            normalise = (
                [GroupNorm(SPATIAL_WIDTH), nn.SiLU()] if settings.pool == "spatial_v2" else [nn.ReLU()]
            )
            self.out = nn.Sequential(
                nn.Linear(sum(self.skip_channels) + channels, SPATIAL_WIDTH),
                *normalise,
                nn.Linear(SPATIAL_WIDTH, classes),
            )
        else:
            raise InputError(
                f"Unknown pooling {settings.pool!r}. Give attention, adaptive, spatial or spatial_v2."
            )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits at one timestep.

        Args:
            x: (b, in_channels, image_size, image_size) float32, noisy images.
            t: (b,), timesteps of the training schedule (0 to 999).

        Returns:
            (b, classes) float32.
        """
        outputs = self.descend(x, self.embed(t, None))
        if self.pool.startswith("spatial"):
            h = torch.cat([output.to(x.dtype).mean((2, 3)) for output in outputs], dim=1)
        else:
            h = outputs[-1].to(x.dtype)
        logits: Tensor = self.out(h)
        return logits
