"""The sampler of "Denoising Diffusion Implicit Models"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evalkit.errors import InputError
from generation.denoisers import Denoiser
from generation.guidance import Guide
from generation.noise import Noise
from generation.samplers.base import Callback

__all__ = ["DDIM"]


@dataclass(frozen=True)
class DDIM:
    """DDIM: arXiv 2010.02502, equation 12; guided: arXiv 2105.05233, algorithm 2.

    A learned variance is not used. Guidance shifts the predicted noise.

    Attributes:
        eta: Share of the ancestral sampler's noise, 0 to 1; 0 is deterministic.

    Raises:
        InputError: ``eta`` is out of range.
    """

    name: ClassVar[str] = "ddim"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InputError(f"The sampler ddim was given eta {self.eta}; expected 0 to 1.")

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        noise: Noise,
        *,
        guide: Guide | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """See :class:`generation.samplers.base.Sampler`."""
        schedule = denoiser.schedule
        for step in reversed(range(len(schedule))):
            x_0 = denoiser(x, step).x_0.clamp(-1, 1)
            eps = schedule.eps(x, step, x_0)
            if guide and (gradient := guide(x, int(schedule.timesteps[step]))) is not None:
                eps = eps - float(schedule.sqrt_one_minus_alphas_cumprod[step]) * gradient
                x_0 = schedule.x_0(x, step, eps)  # not clipped again
            abar, abar_prev = float(schedule.alphas_cumprod[step]), float(schedule.alphas_cumprod_prev[step])
            sigma = self.eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
            x = math.sqrt(abar_prev) * x_0 + math.sqrt(1 - abar_prev - sigma**2) * eps
            if step and sigma:
                x = x + sigma * noise(step)
            if callback:
                callback(step, x, x_0)
        return x
