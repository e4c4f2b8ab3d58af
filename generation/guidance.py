"""Classifier guidance: the gradient of a class's log probability, by which a sampler shifts each step.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), section 4. How the
gradient is used is up to each sampler (:mod:`generation.samplers`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.networks.precision import Prepared

__all__ = ["ClassifierGuidance", "Guide", "LogitsOf", "classifier_gradient"]

LogitsOf: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A classifier of noisy images: ``(b, c, h, w)`` float32 and ``(b,)`` timesteps to ``(b, classes)``."""

Guide: TypeAlias = Callable[[Tensor, int], "Tensor | None"]
"""``(b, c, h, w)`` noisy images and their timestep to the gradient, or None where it is zero."""


def classifier_gradient(
    classifier: LogitsOf, x: Tensor, t: Tensor, y: Tensor, scale: float | Tensor
) -> Tensor:
    """The gradient of ``scale * sum(log softmax(classifier(x, t))[y])`` at ``x``.

    The backward pass is seeded with ``scale * (onehot(y) - softmax(logits))``, which is the gradient at the
    logits. Only ``x`` asks for a gradient; freeze the parameters, so that nothing is kept for theirs.

    Args:
        classifier: The network.
        x: (b, c, h, w) float32, noisy images.
        t: (b,) timesteps.
        y: (b,) int64 classes.
        scale: Guidance scale s, a number or a float32 tensor without dimensions.

    Returns:
        (b, c, h, w) float32.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = classifier(x, t)
        probabilities = logits.detach().float().softmax(dim=-1)
        seed = scale * (F.one_hot(y, logits.shape[-1]) - probabilities)
        (gradient,) = torch.autograd.grad(logits, x, seed.to(logits.dtype))
    return gradient


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierGuidance:
    """A :data:`Guide` towards the classes ``y``; the classifier does not run where it has no effect.

    Attributes:
        classifier: The network, its parameters frozen.
        y: (b,) int64 classes, on the device of the samples.
        scale: Guidance scale; 0 guides nowhere.
        timesteps: Guide where ``first <= t < end``, as "Applying Guidance in a Limited Interval Improves
            Sample and Distribution Quality in Diffusion Models" (arXiv 2404.07724) does; None: everywhere.
    """

    classifier: LogitsOf
    y: Tensor
    scale: float
    timesteps: tuple[int, int] | None = None

    def __call__(self, x: Tensor, timestep: int) -> Tensor | None:
        """The gradient at ``x``, or None where there is no guidance."""
        first, end = self.timesteps or (0, timestep + 1)
        if self.scale == 0 or not first <= timestep < end:
            return None
        t = torch.full((len(x),), timestep, device=x.device)
        if isinstance(self.classifier, Prepared):
            return self.classifier.run(classifier_gradient, x, t, self.y, self.scale)
        return classifier_gradient(self.classifier, x, t, self.y, self.scale)
