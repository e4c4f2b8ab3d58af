"""Ancestral sampling of "Denoising Diffusion Probabilistic Models"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from generation.denoisers import Denoiser
from generation.guidance import Guide
from generation.noise import Noise
from generation.samplers.base import Callback

__all__ = ["DDPM"]


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling: arXiv 2006.11239, algorithm 2; guided: arXiv 2105.05233, algorithm 1.

    The variance of a step is the network's where it learned one, and beta_t otherwise. Guidance shifts the
    mean by the variance times the gradient.
    """

    name: ClassVar[str] = "ddpm"

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
            predicted = denoiser(x, step)
            x_0 = predicted.x_0.clamp(-1, 1)
            mean = schedule.posterior_mean(x_0, x, step)
            log_variance = predicted.log_variance
            if log_variance is None:
                log_variance = x.new_full((), float(schedule.fixed_log_variances[step]))
            if guide and (gradient := guide(x, int(schedule.timesteps[step]))) is not None:
                mean = mean + log_variance.exp() * gradient
            x = mean + (0.5 * log_variance).exp() * noise(step) if step else mean
            if callback:
                callback(step, x, x_0)
        return x
