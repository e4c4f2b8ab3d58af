"""Samplers: from noise to images, one function an algorithm.

Each takes a denoiser, the noise to start from, a schedule and the source of the noise of its steps, and
returns x_0. All run without gradients, in the type of the starting noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from generation.guidance import Guide
from generation.noise import Noise
from generation.schedule import Schedule
from generation.settings import Thresholding

__all__ = ["Denoiser", "Watch", "ddim", "ddpm", "dpm_solver_pp_2m", "to_uint8"]

Denoiser: TypeAlias = Callable[[Tensor, int], Tensor]
"""``(b, c, h, w)`` noisy images and their timestep to the predicted noise, ``(b, c, h, w)``, or with the
learned variance ``(b, 2c, h, w)``. Classes and small images are bound to it."""

Watch: TypeAlias = Callable[[int, Tensor, Tensor], None]
"""Told after each step: the step (0 is the last), the sample after it, and the x_0 that it predicted."""


@torch.no_grad()
def ddpm(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    *,
    guide: Guide | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Ancestral sampling: arXiv 2006.11239, algorithm 2; guided: arXiv 2105.05233, algorithm 1.

    Args:
        denoiser: Predicts the noise, and the variance where the network learned it.
        x: (b, c, h, w) standard normal.
        schedule: The steps.
        noise: Gives the noise of each step but the last.
        guide: Gives the gradient that, times the variance, shifts the mean.
        watch: Told about every step.
    """
    for step in reversed(range(len(schedule))):
        t = int(schedule.timesteps[step])
        output = denoiser(x, t)
        eps, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
        x_0 = schedule.x_0(x, step, eps).clamp(-1, 1)
        mean = schedule.posterior_mean(x_0, x, step)
        fixed = x.new_full((), float(schedule.fixed_log_variances[step]))
        log_variance = schedule.log_variance(v, step) if v.shape[1] else fixed
        if guide and (gradient := guide(x, t)) is not None:
            mean = mean + log_variance.exp() * gradient
        x = mean + (0.5 * log_variance).exp() * noise(step) if step else mean
        if watch:
            watch(step, x, x_0)
    return x


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    *,
    eta: float = 0.0,
    guide: Guide | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """DDIM: arXiv 2010.02502, equation 12; guided: arXiv 2105.05233, algorithm 2.

    Args:
        denoiser: Predicts the noise; a learned variance is not used.
        x: (b, c, h, w) standard normal.
        schedule: The steps.
        noise: Gives the noise of each step but the last, where ``eta`` is not 0.
        eta: Share of the ancestral sampler's noise: 0 is deterministic.
        guide: Gives the gradient that shifts the predicted noise.
        watch: Told about every step.
    """
    for step in reversed(range(len(schedule))):
        t = int(schedule.timesteps[step])
        x_0 = schedule.x_0(x, step, denoiser(x, t)[:, : x.shape[1]]).clamp(-1, 1)
        eps = schedule.eps(x, step, x_0)
        if guide and (gradient := guide(x, t)) is not None:
            eps = eps - float(schedule.sqrt_one_minus_alphas_cumprod[step]) * gradient
            x_0 = schedule.x_0(x, step, eps)  # not clipped again
        abar, abar_prev = float(schedule.alphas_cumprod[step]), float(schedule.alphas_cumprod_prev[step])
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
        x = math.sqrt(abar_prev) * x_0 + math.sqrt(1 - abar_prev - sigma**2) * eps
        if step and sigma:
            x = x + sigma * noise(step)
        if watch:
            watch(step, x, x_0)
    return x


@torch.no_grad()
def dpm_solver_pp_2m(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    *,
    thresholding: Thresholding = "static",
    guide: Guide | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """DPM-Solver++(2M): arXiv 2211.01095, algorithm 2; multistep, of second order, deterministic.

    The first and the last step are of first order; the last goes to x_0 itself.

    Args:
        denoiser: Predicts the noise; a learned variance is not used.
        x: (b, c, h, w) standard normal.
        schedule: The steps.
        noise: Not asked.
        thresholding: What keeps the predicted x_0, guidance included, in range: ``static`` clips it to
            [-1, 1], ``dynamic`` does as :func:`dynamic_threshold`.
        guide: Gives the gradient that shifts the predicted noise.
        watch: Told about every step.
    """
    del noise
    # alpha, sigma and half the log signal-to-noise ratio; at the end there is no noise left.
    alpha = np.append(np.sqrt(schedule.alphas_cumprod_prev), schedule.sqrt_alphas_cumprod[-1:])
    sigma = np.append(0.0, schedule.sqrt_one_minus_alphas_cumprod)
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(alpha) - np.log(sigma)
    h_before, x_0_before = 0.0, None
    for step in reversed(range(len(schedule))):
        t = int(schedule.timesteps[step])
        eps = denoiser(x, t)[:, : x.shape[1]]
        if guide and (gradient := guide(x, t)) is not None:
            eps = eps - float(schedule.sqrt_one_minus_alphas_cumprod[step]) * gradient
        x_0 = schedule.x_0(x, step, eps)
        x_0 = x_0.clamp(-1, 1) if thresholding == "static" else dynamic_threshold(x_0)
        h = float(half_log_snr[step] - half_log_snr[step + 1])
        slope = x_0
        if x_0_before is not None and step:
            slope = x_0 + (x_0 - x_0_before) * (h / h_before / 2)
        x = float(sigma[step] / sigma[step + 1]) * x - float(alpha[step]) * math.expm1(-h) * slope
        h_before, x_0_before = h, x_0
        if watch:
            watch(step, x, x_0)
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


def to_uint8(x: Tensor) -> NDArray[np.uint8]:
    """``(b, c, h, w)`` in [-1, 1] to ``(b, h, w, c)`` uint8, clipped and truncated as by the reference."""
    pixels = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    array: NDArray[np.uint8] = pixels.contiguous().cpu().numpy()
    return array
