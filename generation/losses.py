"""The losses of training, and the choice of their timesteps.

Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), sections 3.1 and
3.3, as the ADM models were trained.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from generation.schedule import Schedule

__all__ = [
    "TIMESTEP_SAMPLERS",
    "HybridLoss",
    "LossSecondMoment",
    "TimestepSampler",
    "UniformTimesteps",
    "hybrid_loss",
    "prior_bits",
]


class HybridLoss(NamedTuple):
    """Losses of each image, ``(b,)`` float32.

    Attributes:
        total: ``mse + vb``.
        mse: Mean squared error of the predicted noise, L_simple.
        vb: The term of the variational bound at the image's timestep, in bits per dimension, times the
            number of timesteps over 1000; 0 where the variance is not learned.
    """

    total: Tensor
    mse: Tensor
    vb: Tensor


def hybrid_loss(
    output: Tensor, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, schedule: Schedule
) -> HybridLoss:
    """L_hybrid: arXiv 2102.09672, equation 16; the bound trains the variance alone.

    Args:
        output: (b, c, h, w) predicted noise, or (b, 2c, h, w) with the variance's interpolation.
        x_0: (b, c, h, w) float32 images in [-1, 1], 8-bit levels.
        x_t: (b, c, h, w) noisy images.
        noise: (b, c, h, w) what was added.
        t: (b,) int64 timesteps.
        schedule: The training schedule, with all its timesteps.
    """
    eps, v = output[:, : x_0.shape[1]], output[:, x_0.shape[1] :]
    mse = (noise - eps).square().flatten(1).mean(1)
    if not v.shape[1]:
        return HybridLoss(mse, mse, torch.zeros_like(mse))
    predicted_x_0 = schedule.x_0(x_t, t, eps.detach())
    mean = schedule.posterior_mean(predicted_x_0, x_t, t)
    log_variance = schedule.log_variance(v, t)
    divergence = _normal_kl(
        schedule.posterior_mean(x_0, x_t, t),
        schedule.log_variance(torch.full_like(v, -1), t),  # the posterior's own
        mean,
        log_variance,
    )
    likelihood = -_discrete_log_likelihood(x_0, mean, 0.5 * log_variance)
    nats = torch.where(t == 0, likelihood.flatten(1).mean(1), divergence.flatten(1).mean(1))
    vb = nats / math.log(2) * (len(schedule) / 1000)
    return HybridLoss(mse + vb, mse, vb)


def prior_bits(x_0: Tensor, schedule: Schedule) -> Tensor:
    """Information about the images that is left at the last timestep: L_T of arXiv 2102.09672, equation 4.

    Args:
        x_0: (b, c, h, w) float32 images in [-1, 1].
        schedule: The training schedule.

    Returns:
        (b,) bits per dimension. Training cannot change it; it should be far below what the model reaches.
    """
    mean = float(schedule.sqrt_alphas_cumprod[-1]) * x_0
    log_variance = x_0.new_full((), math.log(1 - schedule.alphas_cumprod[-1]))
    zero = x_0.new_zeros(())
    return _normal_kl(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)


def _normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Divergence of a normal distribution from another, in nats, elementwise."""
    return 0.5 * (
        -1.0
        + other_log_variance
        - log_variance
        + (log_variance - other_log_variance).exp()
        + (mean - other_mean).square() * (-other_log_variance).exp()
    )


def _discrete_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Logarithm of a normal distribution's mass in the 8-bit bin around ``x``, elementwise.

    The outer bins reach to infinity: arXiv 2006.11239, section 3.3. The distribution function is the
    reference's approximation by tanh, and masses below 1e-12 count as that.
    """
    inverse = (-log_scale).exp()
    above = _normal_cdf((x - mean + 1 / 255) * inverse)
    below = _normal_cdf((x - mean - 1 / 255) * inverse)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class TimestepSampler(Protocol):
    """Chooses the timesteps of a batch."""

    def draw(self, uniform: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Timesteps for ``(b,)`` numbers from [0, 1), and the weights that keep the mean loss unbiased."""

    def update(self, t: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Learn from the unweighted ``(b,)`` losses of the whole batch."""

    def state(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to a state that :meth:`state` returned."""


class UniformTimesteps:
    """Every timestep is as likely as any other.

    Args:
        steps: Timesteps of the training.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def draw(self, uniform: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See :class:`TimestepSampler`."""
        return (uniform * self.steps).astype(np.int64), np.ones(len(uniform), np.float32)

    def update(self, t: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Nothing is learned."""

    def state(self) -> dict[str, Tensor]:
        """Nothing is kept."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing is kept."""


class LossSecondMoment:
    """Timesteps as likely as the root mean square of their last ten losses: arXiv 2102.09672, equation 18.

    Until every timestep has ten, all are equally likely; later one in a thousand is still drawn from all.

    Args:
        steps: Timesteps of the training.
    """

    HISTORY = 10
    UNIFORM = 0.001

    def __init__(self, steps: int):
        self._losses = np.zeros((steps, self.HISTORY))
        self._counts = np.zeros(steps, np.int64)

    def draw(self, uniform: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See :class:`TimestepSampler`."""
        p = self._probabilities()
        t = np.searchsorted(np.cumsum(p)[:-1], uniform, side="right")
        return t, (1 / (len(p) * p[t])).astype(np.float32)

    def _probabilities(self) -> NDArray[np.float64]:
        steps = len(self._counts)
        if (self._counts < self.HISTORY).any():
            return np.full(steps, 1 / steps)
        root = np.sqrt(np.square(self._losses).mean(axis=1))
        probabilities: NDArray[np.float64] = root / root.sum() * (1 - self.UNIFORM) + self.UNIFORM / steps
        return probabilities

    def update(self, t: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """See :class:`TimestepSampler`; a new loss takes the place of the oldest."""
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self._losses[step, self._counts[step] % self.HISTORY] = loss
            self._counts[step] += 1

    def state(self) -> dict[str, Tensor]:
        """The losses and how many there were."""
        return {
            "losses": torch.from_numpy(self._losses.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """See :class:`TimestepSampler`."""
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


TIMESTEP_SAMPLERS: dict[str, type[UniformTimesteps] | type[LossSecondMoment]] = {
    "uniform": UniformTimesteps,
    "loss-second-moment": LossSecondMoment,
}
"""By their names in the settings."""
