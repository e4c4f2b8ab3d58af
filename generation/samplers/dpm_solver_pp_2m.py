"""DPM-Solver++(2M), and the dynamic thresholding that it offers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from evalkit.errors import InputError
from generation.denoisers import Denoiser
from generation.guidance import Guide
from generation.noise import Noise
from generation.samplers.base import Callback

__all__ = ["DPMSolverPP2M", "Thresholding", "dynamic_threshold"]

Thresholding = Literal["static", "dynamic"]


@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M): arXiv 2211.01095, algorithm 2; multistep, second order, deterministic.

    The first and the last step are first order; the last goes to x_0 itself. A learned variance is not used.
    Guidance shifts the predicted noise.

    Attributes:
        thresholding: What keeps the predicted x_0, guidance included, in range: ``static`` clips it to
            [-1, 1], ``dynamic`` is :func:`dynamic_threshold`.

    Raises:
        InputError: Unknown thresholding.
    """

    name: ClassVar[str] = "dpm-solver++"
    thresholding: Thresholding = "static"

    def __post_init__(self) -> None:
        if self.thresholding not in get_args(Thresholding):
            raise InputError(
                f"The sampler dpm-solver++ was given thresholding {self.thresholding!r}; expected static or "
                "dynamic."
            )

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
        del noise
        schedule = denoiser.schedule
        # alpha, sigma and half the log signal-to-noise ratio; at the end there is no noise left.
        alpha = np.append(np.sqrt(schedule.alphas_cumprod_prev), schedule.sqrt_alphas_cumprod[-1:])
        sigma = np.append(0.0, schedule.sqrt_one_minus_alphas_cumprod)
        with np.errstate(divide="ignore"):
            half_log_snr = np.log(alpha) - np.log(sigma)
        h_before, x_0_before = 0.0, None
        for step in reversed(range(len(schedule))):
            predicted = denoiser(x, step)
            x_0 = predicted.x_0
            if guide and (gradient := guide(x, int(schedule.timesteps[step]))) is not None:
                eps = predicted.eps - float(schedule.sqrt_one_minus_alphas_cumprod[step]) * gradient
                x_0 = schedule.x_0(x, step, eps)
            x_0 = x_0.clamp(-1, 1) if self.thresholding == "static" else dynamic_threshold(x_0)
            h = float(half_log_snr[step] - half_log_snr[step + 1])
            slope = x_0
            if x_0_before is not None and step:
                slope = x_0 + (x_0 - x_0_before) * (h / h_before / 2)
            x = float(sigma[step] / sigma[step + 1]) * x - float(alpha[step]) * math.expm1(-h) * slope
            h_before, x_0_before = h, x_0
            if callback:
                callback(step, x, x_0)
        return x


def dynamic_threshold(x_0: Tensor, percentile: float = 0.995) -> Tensor:
    """Dynamic thresholding: arXiv 2205.11487, section 2.3.

    Each image is clipped to the given percentile of its absolute values and divided by it, if that is more
    than 1.
    """
    # Row by row: torch.quantile takes 2^24 numbers at most.
    limits = torch.stack([torch.quantile(row, percentile) for row in x_0.abs().flatten(1)])
    limits = limits.clamp(min=1).view(-1, 1, 1, 1)
    return x_0.clamp(-limits, limits) / limits
