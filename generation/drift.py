"""How far one mode's arithmetic leads from another's: the same noise, sampled in both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import EvalkitError, InputError
from generation.batch import Networks, bind, sample_batch, schedule_of
from generation.networks.modes import arithmetic
from generation.samplers import to_uint8
from generation.settings import Settings, choose_labels

__all__ = ["Drift", "StepDrift", "measure"]

MOST = 1024
GREY_LEVELS = 127.5
"""A difference of 1 between samples in [-1, 1], in levels of an 8-bit image."""


@dataclass(frozen=True, kw_only=True)
class StepDrift:
    """The difference at one timestep.

    Attributes:
        timestep: Which.
        prediction: Of the diffusion models' outputs for the same noisy image, relative.
        gradient: Of the guidance for the same noisy image, relative; None where there is none.
        mean: Of the noisy images that the two runs have come to: mean absolute difference, grey levels.
        largest: Its largest.
    """

    timestep: int
    prediction: float
    gradient: float | None
    mean: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The difference between two runs with the same noise.

    Attributes:
        steps: Some of the steps, from noise to image.
        mean: Mean absolute difference of the 8-bit images, grey levels.
        largest: Their largest.
        changed: Share of their values that differ.
    """

    steps: tuple[StepDrift, ...]
    mean: float
    largest: int
    changed: float


def measure(settings: Settings, reference: Networks, other: Networks, *, rows: int = 10) -> Drift:
    """Sample the same in both arithmetics.

    Args:
        settings: What to sample; all at once, so a few.
        reference: What the difference is from.
        other: The same networks in another mode.
        rows: Steps to report.

    Raises:
        EvalkitError: The device's memory does not suffice.
        InputError: The networks are an upsampler's, or not the same, or samples are not finite or too many.
    """
    if settings.count > MOST:
        raise InputError(f"{settings.count:,} samples (-n) in one batch; give at most {MOST:,}.")
    preset = reference.diffusion.preset
    if preset.kind == "upsampler":
        raise InputError(f"{preset.name} is an upsampler; the drift of diffusion models alone is measured.")
    labels = choose_labels(settings, reference.num_classes(guided=settings.scale != 0))
    timesteps = schedule_of(settings, reference).timesteps
    shown = set(np.linspace(len(timesteps) - 1, 1, rows).round().astype(int).tolist())
    ours: dict[int, tuple[Tensor, float, float | None]] = {}
    seen: dict[int, Tensor] = {}

    def compare(step: int, x: Tensor, _: Tensor) -> None:
        if step in shown:  # x is what the next step reads
            t = int(timesteps[step - 1])
            ours[step] = (x, *_differences(settings, (reference, other), labels, x, t))

    def keep(step: int, x: Tensor, _: Tensor) -> None:
        if step in shown:
            seen[step] = x

    images = []
    for networks, watch in ((reference, compare), (other, keep)):
        try:
            with arithmetic(networks.mode):
                x, finite = sample_batch(
                    settings, networks, range(settings.count), labels=labels, watch=watch
                )
        except torch.OutOfMemoryError:
            raise EvalkitError(
                f"{networks.device} has too little memory for {settings.count} samples in one batch. Give "
                "fewer (-n)."
            ) from None
        if not finite.all():
            raise InputError(f"Samples of mode {networks.mode} are not finite: the drift has no value.")
        images.append(to_uint8(x).astype(np.int16))
    steps = []
    for step, (x, prediction, gradient) in ours.items():
        difference = (seen[step] - x).abs() * GREY_LEVELS
        steps.append(
            StepDrift(
                timestep=int(timesteps[step - 1]),
                prediction=prediction,
                gradient=gradient,
                mean=float(difference.mean()),
                largest=float(difference.max()),
            )
        )
    levels = np.abs(images[0] - images[1])
    return Drift(
        steps=tuple(steps),
        mean=float(levels.mean()),
        largest=int(levels.max()),
        changed=float((levels > 0).mean()),
    )


@torch.no_grad()
def _differences(
    settings: Settings,
    pair: tuple[Networks, Networks],
    labels: NDArray[np.int64] | None,
    x: Tensor,
    timestep: int,
) -> tuple[float, float | None]:
    """Relative differences of prediction and guidance at the same ``x``."""
    predictions, gradients = [], []
    for networks in pair:
        denoiser, guide = bind(settings, networks, labels)
        with arithmetic(networks.mode):
            predictions.append(denoiser(x, timestep))
            gradients.append(guide(x, timestep) if guide else None)
    expected, found = gradients
    return _relative(*predictions), None if expected is None or found is None else _relative(expected, found)


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
