"""The noise schedule of a diffusion model, and the steps that a sampler takes through it.

Notation of "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239): x_t = sqrt(abar_t) x_0 +
sqrt(1 - abar_t) eps with abar_t the running product of 1 - beta_t. Every table is float64. The step of a
table is the sampler's own (0 is the last); the timestep that is passed to the network is in
:attr:`Schedule.timesteps`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError

__all__ = ["Schedule", "betas", "make_schedule", "respace"]

Float64Array = NDArray[np.float64]
Step: TypeAlias = "int | Tensor"


def make_schedule(name: str = "linear", steps: int = 1000, respacing: str | None = None) -> Schedule:
    """The schedule that a model was trained with, or the part of it that ``respacing`` keeps.

    Args:
        name: ``linear`` or ``cosine``.
        steps: Timesteps of the training, 1000 for every published model.
        respacing: See :func:`respace`; None keeps every step.

    Raises:
        InputError: ``name`` or ``respacing`` is not understood.
    """
    trained = betas(name, steps)
    kept = np.arange(steps) if respacing is None else respace(respacing, steps)
    abar = np.cumprod(1.0 - trained)[kept]
    # The betas under which the kept steps have the abar that they had among all steps.
    return Schedule(betas=1.0 - abar / np.append(1.0, abar[:-1]), timesteps=kept)


def betas(name: str, steps: int) -> Float64Array:
    """``(steps,)`` variances of the noise that each step of the forward process adds.

    ``linear``: from 1e-4 to 0.02 at 1000 steps, scaled for others so that abar stays. ``cosine``: "Improved
    Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), equation 17, capped at 0.999.

    Raises:
        InputError: Another name.
    """
    if name == "linear":
        scale = 1000 / steps
        return np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)
    if name == "cosine":
        abar = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
        return np.array([min(1 - after / before, 0.999) for before, after in pairwise(abar)])
    raise InputError(f"Unknown noise schedule {name!r}. Give linear or cosine.")


def respace(respacing: str, steps: int) -> NDArray[np.int64]:
    """The timesteps that a sampler visits, ascending.

    Args:
        respacing: ``"250"``: so many, evenly spread from the first to the last. ``"90,60,60,20,20"``: the
            steps are cut into as many equal sections as there are numbers, and each section keeps so many,
            its first and last among them. ``"ddim25"``: every k-th from 0 on, with the smallest k that gives
            exactly 25. ``""``: all, as in the published scripts, whose default it is.
        steps: Timesteps of the training.

    Raises:
        InputError: It is not one of these forms, or asks for more steps than there are.
    """
    if not respacing:
        return np.arange(steps)
    sections = [part.strip() for part in respacing.removeprefix("ddim").split(",")]
    # Of up to 9 digits: Python reads no number of thousands of them.
    if not all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in sections):
        raise InputError(
            f"Respacing {respacing[:80]!r} is not understood. Give a number of steps (250), numbers of steps "
            'a section (90,60,60,20,20), ddim and a number (ddim25), or "" for all steps.'
        )
    counts = [int(part) for part in sections]
    if sum(counts) < 2:
        raise InputError(f"Respacing {respacing!r} keeps one step; expected at least 2.")
    if not respacing.startswith("ddim"):
        return _sections(counts, steps)
    for stride in range(1, steps):
        if [len(range(0, steps, stride))] == counts:
            return np.arange(0, steps, stride)
    raise InputError(f"Respacing {respacing!r}: no whole stride takes so many of {steps} steps.")


def _sections(counts: list[int], steps: int) -> NDArray[np.int64]:
    kept: list[int] = []
    start, (size, longer) = 0, divmod(steps, len(counts))
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise InputError(
                f"Respacing asks for {count} steps of section {section + 1}, which has {length} of {steps}."
            )
        gap = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += gap  # added up, as the reference does: a product would round elsewhere
        start += length
    return np.array(kept, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The tables of a diffusion process, and its formulas in them.

    The formulas take a step as a number, the same for the whole batch, or as a ``(b,)`` int64 tensor, one
    for each image, as training does. With a number the tables' values enter the arithmetic as scalars, so
    that nothing is copied to the device; with a tensor they are looked up there.

    Attributes:
        betas: (n,) float64.
        timesteps: (n,) int64, ascending: the timestep that is passed to the network at each step.
    """

    betas: Float64Array
    timesteps: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Float64Array:
        """The running product of 1 - beta_t."""
        return np.cumprod(1.0 - self.betas, dtype=np.float64)

    @cached_property
    def alphas_cumprod_prev(self) -> Float64Array:
        """The abar of the step that is sampled next; 1 after the last."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def sqrt_alphas_cumprod(self) -> Float64Array:
        """sqrt(abar_t), the weight of x_0 in x_t."""
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Float64Array:
        """sqrt(1 - abar_t), the weight of the noise in x_t."""
        return np.sqrt(1.0 - self.alphas_cumprod)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Float64Array:
        """1 / sqrt(abar_t)."""
        return np.sqrt(1.0 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Float64Array:
        """sqrt(1 / abar_t - 1)."""
        return np.sqrt(1.0 / self.alphas_cumprod - 1.0)

    @cached_property
    def posterior_variance(self) -> Float64Array:
        """Variance of q(x_{t-1} | x_t, x_0); 0 at the last step."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Float64Array:
        """Logarithm of the posterior variance; that of the last step is replaced by its neighbour's."""
        variance = self.posterior_variance
        clipped: Float64Array = np.log(np.append(variance[1], variance[1:]))
        return clipped

    @cached_property
    def log_betas(self) -> Float64Array:
        """log(beta_t), the upper bound of a learned log variance."""
        return np.log(self.betas)

    @cached_property
    def fixed_log_variances(self) -> Float64Array:
        """The log variance where the network has none: that of beta_t, at the last step the clipped one."""
        return np.append(self.posterior_log_variance_clipped[0], np.log(self.betas[1:]))

    @cached_property
    def posterior_mean_coef1(self) -> Float64Array:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Float64Array:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    def diffuse(self, x_0: Tensor, step: Step, noise: Tensor) -> Tensor:
        """x_t of q(x_t | x_0) with the given standard normal ``noise``."""
        signal = self._at("sqrt_alphas_cumprod", step, x_0)
        return signal * x_0 + self._at("sqrt_one_minus_alphas_cumprod", step, x_0) * noise

    def x_0(self, x: Tensor, step: Step, eps: Tensor) -> Tensor:
        """The x_0 that follows from x_t and its noise."""
        recip = self._at("sqrt_recip_alphas_cumprod", step, x)
        return recip * x - self._at("sqrt_recipm1_alphas_cumprod", step, x) * eps

    def eps(self, x: Tensor, step: Step, x_0: Tensor) -> Tensor:
        """The noise that follows from x_t and its x_0."""
        recip = self._at("sqrt_recip_alphas_cumprod", step, x)
        return (recip * x - x_0) / self._at("sqrt_recipm1_alphas_cumprod", step, x)

    def posterior_mean(self, x_0: Tensor, x: Tensor, step: Step) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        coef1 = self._at("posterior_mean_coef1", step, x)
        return coef1 * x_0 + self._at("posterior_mean_coef2", step, x) * x

    def log_variance(self, v: Tensor, step: Step) -> Tensor:
        """Learned log variance of p(x_{t-1} | x_t): arXiv 2102.09672, equation 15.

        Args:
            v: The network's second half, (b, c, h, w): -1 is the posterior's variance, 1 is beta_t.
            step: One for the batch, or ``(b,)``.
        """
        low, high = self._at("posterior_log_variance_clipped", step, v), self._at("log_betas", step, v)
        fraction = (v + 1) / 2
        return fraction * high + (1 - fraction) * low

    def _at(self, name: str, step: Step, like: Tensor) -> float | Tensor:
        table: Float64Array = getattr(self, name)
        if isinstance(step, int):
            return float(table[step])
        key = (name, like.device)
        if key not in self._placed:
            self._placed[key] = torch.from_numpy(table.astype(np.float32)).to(like.device)
        return self._placed[key][step].view(-1, *[1] * (like.dim() - 1))

    @cached_property
    def _placed(self) -> dict[tuple[str, torch.device], Tensor]:
        """Tables that are on a device already, as float32."""
        return {}
