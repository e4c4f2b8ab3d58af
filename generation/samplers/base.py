"""What every sampler is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, TypeAlias

from torch import Tensor

from generation.denoisers import Denoiser
from generation.guidance import Guide
from generation.noise import Noise

__all__ = ["Callback", "Sampler"]

Callback: TypeAlias = Callable[[int, Tensor, Tensor], object]
"""Called after each step with the step (0 is the last), the sample after it, and the predicted x_0."""


class Sampler(Protocol):
    """A frozen dataclass whose fields are the algorithm's parameters; calling it samples.

    Every parameter has a default, a type that JSON holds, and a check in ``__post_init__`` that raises an
    InputError. Samplers with equal parameters are equal.

    Attributes:
        name: The sampler's row in :data:`generation.samplers.SAMPLERS`.
    """

    name: ClassVar[str]

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        noise: Noise,
        *,
        guide: Guide | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Images from noise, without gradients, in the type of ``x``.

        Args:
            denoiser: Predicts x_0, the noise and, where learned, the variance at each step of its schedule.
            x: (b, c, h, w) standard normal.
            noise: Called for the noise of each step but the last, by samplers that add noise.
            guide: Gives the gradient of the log probability of the class.
            callback: Called after every step.

        Returns:
            (b, c, h, w), x_0 in [-1, 1].
        """
