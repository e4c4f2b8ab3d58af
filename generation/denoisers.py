"""What a network predicts, in the terms that samplers use: x_0, the noise, the variance.

Networks are trained to predict the noise eps ("Denoising Diffusion Probabilistic Models", arXiv 2006.11239),
the image x_0, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 ("Progressive Distillation for Fast Sampling of
Diffusion Models", arXiv 2202.00512, section 4). Each of them, with x_t, gives the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from torch import Tensor

from generation.schedule import Schedule

__all__ = [
    "DENOISERS",
    "BoundNetwork",
    "Denoiser",
    "EpsDenoiser",
    "Prediction",
    "PredictionType",
    "VDenoiser",
    "X0Denoiser",
]

PredictionType: TypeAlias = Literal["eps", "x_0", "v"]

BoundNetwork: TypeAlias = Callable[[Tensor, int], Tensor]
"""``(b, c, h, w)`` noisy images and their timestep to the network's output: ``(b, c, h, w)``, or with a
learned variance ``(b, 2c, h, w)``, whose second half interpolates the log variance. Classes and small images
are bound to it."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """A denoiser's prediction for one batch at one step; each form is computed on first use.

    Attributes:
        denoiser: Whose prediction it is.
        x: (b, c, h, w) noisy images.
        step: The sampler's step, 0 is the last.
        output: The network's output, see :data:`BoundNetwork`.
    """

    denoiser: Denoiser
    x: Tensor
    step: int
    output: Tensor

    @cached_property
    def x_0(self) -> Tensor:
        """(b, c, h, w) the image, not clipped."""
        return self.denoiser.x_0(self.x, self.step, self.output[:, : self.x.shape[1]])

    @cached_property
    def eps(self) -> Tensor:
        """(b, c, h, w) the noise."""
        return self.denoiser.eps(self.x, self.step, self.output[:, : self.x.shape[1]])

    @cached_property
    def log_variance(self) -> Tensor | None:
        """(b, c, h, w) learned log variance of the step to x_{t-1}; None where the network has none."""
        v = self.output[:, self.x.shape[1] :]
        return self.denoiser.schedule.log_variance(v, self.step) if v.shape[1] else None


@dataclass(frozen=True, eq=False)
class Denoiser(ABC):
    """A network and the schedule by which to read its output; a subclass a type of prediction.

    Attributes:
        network: The network.
        schedule: The steps to sample.
    """

    network: BoundNetwork
    schedule: Schedule

    def __call__(self, x: Tensor, step: int) -> Prediction:
        """Run the network on ``(b, c, h, w)`` noisy images at a step of the schedule."""
        return Prediction(self, x, step, self.network(x, int(self.schedule.timesteps[step])))

    @abstractmethod
    def x_0(self, x: Tensor, step: int, predicted: Tensor) -> Tensor:
        """The image that a prediction implies, ``(b, c, h, w)`` all."""

    @abstractmethod
    def eps(self, x: Tensor, step: int, predicted: Tensor) -> Tensor:
        """The noise that a prediction implies, ``(b, c, h, w)`` all."""


class EpsDenoiser(Denoiser):
    """The network predicts the noise, as all published ADM models do."""

    def x_0(self, x: Tensor, step: int, predicted: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        return self.schedule.x_0(x, step, predicted)

    def eps(self, x: Tensor, step: int, predicted: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        del x, step
        return predicted


class X0Denoiser(Denoiser):
    """The network predicts the image."""

    def x_0(self, x: Tensor, step: int, predicted: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        del x, step
        return predicted

    def eps(self, x: Tensor, step: int, predicted: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        return self.schedule.eps(x, step, predicted)


class VDenoiser(Denoiser):
    """The network predicts v: arXiv 2202.00512, appendix D."""

    def x_0(self, x: Tensor, step: int, predicted: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        alpha, sigma = self._signal_and_noise(step)
        return alpha * x - sigma * predicted

    def eps(self, x: Tensor, step: int, predicted: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        alpha, sigma = self._signal_and_noise(step)
        return alpha * predicted + sigma * x

    def _signal_and_noise(self, step: int) -> tuple[float, float]:
        schedule = self.schedule
        return float(schedule.sqrt_alphas_cumprod[step]), float(schedule.sqrt_one_minus_alphas_cumprod[step])


DENOISERS: dict[PredictionType, type[Denoiser]] = {"eps": EpsDenoiser, "x_0": X0Denoiser, "v": VDenoiser}
"""By what the network predicts."""
