"""The settings that decide the samples of a run, beside its networks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError
from evalkit.system.files import read_text
from generation.noise import random_labels
from generation.samplers import sampler_record
from generation.samplers.base import Sampler
from generation.samplers.ddpm import DDPM

__all__ = ["Settings", "check_labels", "choose_labels"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the samples, beside the networks and, for an upsampler, the small images.

    Attributes:
        count: Samples in all.
        seed: From 0 to 2^64 - 1.
        classes: ``random``, ``balanced`` (0, 1, 2 ... and over again), a class, or a file with ``count`` of
            them (npy, or text with one a line); None: random where there are classes. An upsampler takes
            those of the small images.
        scale: Guidance scale; 0: no guidance.
        guidance_timesteps: Guide where ``first <= t < end`` only; None: everywhere.
        sampler: The algorithm with its parameters, such as ``DDIM(eta=0.5)``; from a name by
            :func:`generation.samplers.make_sampler`.
        respacing: The steps, see :func:`generation.schedule.respace`.
        shard_size: Samples a shard, and so the largest batch.

    Raises:
        InputError: A value is out of range, or ``sampler`` is a name.
    """

    count: int
    seed: int = 0
    classes: str | None = None
    scale: float = 0.0
    guidance_timesteps: tuple[int, int] | None = None
    sampler: Sampler = field(default_factory=DDPM)
    respacing: str = "250"
    shard_size: int = 64

    def __post_init__(self) -> None:
        _require(1 <= self.count < 2**32, f"{self.count} samples (-n); expected 1 to 2^32 - 1")
        _require(0 <= self.seed < 2**64, f"seed {self.seed}; expected 0 to 2^64 - 1")
        _require(math.isfinite(self.scale), f"guidance scale {self.scale}; expected a finite number")
        first, end = self.guidance_timesteps or (0, 1)
        _require(0 <= first < end, f"guidance from timestep {first} to {end}; expected 0 <= first < end")
        _require(self.shard_size >= 1, f"shard-size {self.shard_size}; expected a number from 1")
        _require(callable(self.sampler), f"sampler {self.sampler!r}; expected make_sampler(name) or the like")

    def record(self) -> dict[str, Any]:
        """Every setting as JSON holds it, for the record of a run: the sampler as its name and parameters."""
        return {**asdict(self), "sampler": sampler_record(self.sampler)}


def _require(right: bool, message: str) -> None:
    if not right:
        raise InputError(f"Cannot sample with these settings: {message}.")


def choose_labels(settings: Settings, num_classes: int | None) -> NDArray[np.int64] | None:
    """One class a sample.

    Args:
        settings: How many, and which.
        num_classes: Number of classes; None: there are none.

    Returns:
        ``(count,)``; None where there are no classes.

    Raises:
        InputError: They are out of range, of another number or unreadable, or there are none.
    """
    classes, count = settings.classes, settings.count
    if num_classes is None:
        if classes is not None:
            raise InputError(
                f"--classes {classes!r} was given, but this model has no classes and is not guided. "
                "Leave it out."
            )
        return None
    if classes is None or classes == "random":
        return random_labels(settings.seed, count, num_classes)
    if classes == "balanced":
        return np.arange(count, dtype=np.int64) % num_classes
    if (one := _class_of(classes)) is not None:
        check_labels(np.array([one]), num_classes, "--classes")
        return np.full(count, one, dtype=np.int64)
    labels = _read_labels(Path(classes), count)
    check_labels(labels, num_classes, classes)
    return labels.astype(np.int64)


def check_labels(labels: NDArray[Any], num_classes: int, where: str) -> None:
    """Refuse classes out of range.

    Raises:
        InputError: One is below 0 or not below ``num_classes``.
    """
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        raise InputError(f"{where}: class {outside[0]} is out of range: there are 0 to {num_classes - 1}.")


def _class_of(text: str) -> int | None:
    """The number that a text reads as, or None; beyond what an array holds, the largest that it does."""
    digits = text.removeprefix("-")
    if not digits.isdecimal():
        return None
    # Python reads no number of thousands of digits, and NumPy none beyond 2^63.
    number = int(digits) if len(digits) < 19 else np.iinfo(np.int64).max
    return -number if text.startswith("-") else number


def _read_labels(path: Path, count: int) -> NDArray[Any]:
    """``(count,)`` integers of any type."""
    try:
        with path.open("rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
        labels = np.load(path, allow_pickle=False) if is_npy else _parse_labels(read_text(path))
    except Exception as error:  # NumPy parses a damaged header as Python source, which may raise anything
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InputError(
            f"--classes {str(path)!r} cannot be read: {why}. Give random, balanced, a class, or a file of "
            "classes: npy, or text with one a line."
        ) from error
    if labels.shape != (count,) or labels.dtype.kind not in "ui":
        raise InputError(f"{path} holds {labels.dtype} {labels.shape}; expected {count} integers.")
    return labels


def _parse_labels(text: str) -> NDArray[np.int64]:
    """Numbers between blanks and ends of lines; what follows a # is a comment.

    Raises:
        ValueError: Something else is among them.
    """
    labels = []
    for number, line in enumerate(text.splitlines(), 1):
        for word in line.partition("#")[0].split():
            if (label := _class_of(word)) is None:
                raise ValueError(f"line {number} has {word[:40]!r}, which is no whole number")
            labels.append(label)
    return np.array(labels, dtype=np.int64)
