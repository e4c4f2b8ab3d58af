"""How much samples differ between two precisions: the same noise, sampled in both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import EvalkitError, InputError
from evalkit.system.devices import is_out_of_memory
from generation.batch import Networks, bind, sample_batch, schedule_of
from generation.networks.precision import arithmetic
from generation.pixels import to_uint8
from generation.settings import Settings, choose_labels

__all__ = ["PrecisionCheck", "StepDifference", "check_precision"]

MOST = 1024
GREY_LEVELS = 127.5
"""A difference of 1 between samples in [-1, 1], in levels of an 8-bit image."""


@dataclass(frozen=True, kw_only=True)
class StepDifference:
    """The difference at one timestep.

    Attributes:
        timestep: Timestep of the training schedule.
        prediction: Difference of the networks' outputs for the same noisy image, relative.
        gradient: Difference of the guidance for the same noisy image, relative; None without guidance.
        mean: Mean absolute difference of the noisy images that the two runs have reached, grey levels.
        largest: Their largest difference, grey levels.
    """

    timestep: int
    prediction: float
    gradient: float | None
    mean: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class PrecisionCheck:
    """The difference between two runs with the same noise.

    Attributes:
        steps: Some of the steps, from noise to image.
        mean: Mean absolute difference of the 8-bit images, grey levels.
        largest: Their largest difference, grey levels.
        changed: Share of their values that differ.
    """

    steps: tuple[StepDifference, ...]
    mean: float
    largest: int
    changed: float


def check_precision(
    settings: Settings, reference: Networks, other: Networks, *, rows: int = 10
) -> PrecisionCheck:
    """Sample the same in both precisions.

    Args:
        settings: What to sample; a few, as all are in one batch.
        reference: The networks that the others are compared with.
        other: The same networks in another precision.
        rows: Steps to report.

    Raises:
        EvalkitError: The device's memory does not suffice.
        InputError: The model is an upsampler, or samples are not finite or too many.
    """
    if settings.count > MOST:
        raise InputError(f"{settings.count:,} samples (-n) in one batch; give at most {MOST:,}.")
    preset = reference.diffusion.preset
    if preset.kind == "upsampler":
        raise InputError(f"{preset.name} is an upsampler; only diffusion models can be checked.")
    labels = choose_labels(settings, reference.num_classes(guided=settings.scale != 0))
    timesteps = schedule_of(settings, reference).timesteps
    shown = set(np.linspace(len(timesteps) - 1, 1, rows).round().astype(int).tolist())
    at_reference: dict[int, tuple[Tensor, float, float | None]] = {}
    at_other: dict[int, Tensor] = {}

    def compare(step: int, x: Tensor, _: Tensor) -> None:
        if step in shown:  # x is what the next step reads
            t = int(timesteps[step - 1])
            at_reference[step] = (x, *_differences(settings, (reference, other), labels, x, t))

    def record(step: int, x: Tensor, _: Tensor) -> None:
        if step in shown:
            at_other[step] = x

    images = []
    for networks, callback in ((reference, compare), (other, record)):
        try:
            with arithmetic(networks.precision):
                x, finite = sample_batch(
                    settings, networks, range(settings.count), labels=labels, callback=callback
                )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise EvalkitError(
                f"{networks.device} has too little memory for {settings.count} samples in one batch. Give "
                "fewer (-n)."
            ) from None
        if not finite.all():
            raise InputError(
                f"Samples in precision {networks.precision} are not finite and cannot be compared."
            )
        images.append(to_uint8(x).astype(np.int16))
    steps = []
    for step, (x, prediction, gradient) in at_reference.items():
        difference = (at_other[step] - x).abs() * GREY_LEVELS
        steps.append(
            StepDifference(
                timestep=int(timesteps[step - 1]),
                prediction=prediction,
                gradient=gradient,
                mean=float(difference.mean()),
                largest=float(difference.max()),
            )
        )
    levels = np.abs(images[0] - images[1])
    return PrecisionCheck(
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
        network, guide = bind(settings, networks, labels)
        with arithmetic(networks.precision):
            predictions.append(network(x, timestep))
            gradients.append(guide(x, timestep) if guide else None)
    expected, found = gradients
    return _relative(*predictions), None if expected is None or found is None else _relative(expected, found)


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
