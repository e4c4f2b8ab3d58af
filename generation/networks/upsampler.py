"""The upsampling UNet of ADM: a diffusion model of large images given small ones.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), section 4.3, after
Nichol and Dhariwal (arXiv 2102.09672).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.networks.unet import UNet, UNetSettings

__all__ = ["Upsampler"]


class Upsampler(UNet):
    """A UNet that reads the small image, enlarged, beside the noisy large one."""

    @staticmethod
    def input_channels(settings: UNetSettings) -> int:
        """Channels of what the first convolution reads: noisy image and enlarged small image."""
        return 2 * settings.in_channels

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, low_res: Tensor
    ) -> Tensor:
        """The prediction at one timestep.

        Args:
            x: (b, in_channels, image_size, image_size) float32, noisy images.
            t: (b,), timesteps of the training schedule.
            y: (b,) int64 classes; None for an unconditional network.
            low_res: (b, in_channels, s, s) float32 in [-1, 1], the small images.

        Returns:
            (b, out_channels, image_size, image_size) float32, as of :class:`UNet`.

        Raises:
            InputError: Classes for an unconditional network, or none for a conditional one.
        """
        enlarged = F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)
        return super().forward(torch.cat([x, enlarged], dim=1), t, y)
