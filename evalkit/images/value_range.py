"""The range of pixel values in a file: what the user says it is, and signs that it is not 0 to 255."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, listing

__all__ = [
    "DARK_BATCH",
    "VALUE_RANGES",
    "FloatStatistics",
    "ValueRange",
    "are_cut_floats",
    "check_range_used",
    "cut_floats_problem",
    "parse_value_range",
    "scaled_floats_problem",
]

ValueRange: TypeAlias = str | tuple[float, float]
"""A key of :data:`VALUE_RANGES`, or the two numbers that it stands for."""

VALUE_RANGES: Mapping[str, tuple[float, float]] = {"0..1": (0, 1), "-1..1": (-1, 1), "0..255": (0, 255)}
"""What black and white are in files of floats."""

# Floats that are scaled for a network seldom exceed 4 in size; no 8-bit picture is as dark. Nor is any made
# only of 0, 1 and 2, which is what such floats become when they are cut to integers.
DARK_BATCH, _DARK_IMAGE = 16.0, 2.0
_CUT = {0, 1, 2, 254, 255}  # negative ones wrap around
_SAY = 'say so with --value-range {0} where the command has it (in Python value_range="{0}")'


def parse_value_range(value: ValueRange | None) -> tuple[float, float] | None:
    """The two numbers that a range stands for.

    Raises:
        InputError: It is none of :data:`VALUE_RANGES`.
    """
    if value is None:
        return None
    for key, pair in VALUE_RANGES.items():
        if isinstance(value, str | tuple | list) and (value == key or tuple(value) == pair):
            return pair
    raise InputError(f"Value range {value!r}: expected one of {', '.join(VALUE_RANGES)}.")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def check_range_used(opened: Iterable[_Named], value_range: ValueRange | None) -> None:
    """Raise an InputError if a range of floats was given and there are no floats.

    Args:
        opened: Images, files or features.
        value_range: The range that was given to open them.

    Raises:
        InputError: None of them holds floats.
    """
    opened = list(opened)
    scaled = value_range is not None and parse_value_range(value_range) != VALUE_RANGES["0..255"]
    if scaled and all(getattr(one, "dtype", None) != np.float32 for one in opened):
        raise InputError(
            f"Value range {value_range!r} applies only to floats, and there are none in "
            f"{listing(one.name for one in opened)}. Integers are always from 0 to 255: leave it out."
        )


class FloatStatistics:
    """Collects what tells the range of floats, batch by batch."""

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf
        self._images = self._dark = 0
        self._first_dark = 0

    def update(self, batch: NDArray[Any]) -> None:
        """Add a batch, ``(n, height, width, 3)``."""
        flat = batch.reshape(len(batch), -1)
        lows, highs = flat.min(axis=1), flat.max(axis=1)
        self._low, self._high = min(self._low, float(lows.min())), max(self._high, float(highs.max()))
        dark = (lows >= -_DARK_IMAGE) & (highs <= _DARK_IMAGE) & ((lows != 0) | (highs != 0))
        if dark.any() and not self._dark:
            self._first_dark = self._images + int(dark.argmax())
        self._dark += int(dark.sum())
        self._images += len(batch)

    def found(self) -> dict[str, Any]:
        """Smallest and largest value, number of dark images and index of the first."""
        return {"low": self._low, "high": self._high, "dark": self._dark, "first_dark": self._first_dark}


def scaled_floats_problem(name: str, count: int, found: Mapping[str, Any]) -> str | None:
    """Why floats cannot all be pixels from 0 to 255; None if they can.

    Args:
        name: The source, for the message.
        count: Number of images.
        found: What :meth:`FloatStatistics.found` gave.
    """
    low, high, dark = found["low"], found["high"], found["dark"]
    if -DARK_BATCH < low <= high < DARK_BATCH and (low, high) != (0, 0):
        range_, convert = ("0..1", "x * 255") if low >= -0.5 else ("-1..1", "(x + 1) * 127.5")
        shown = range_.replace("..", ", ")
        return (
            f"{name}: holds floats from {low:.3g} to {high:.3g}, scaled to [{shown}] it seems; "
            f"expected [0, 255]. If they are, {_SAY.format(range_)}, or convert them with "
            f"({convert}).round().clip(0, 255).astype(np.uint8). Latents, and images normalised by mean and "
            "deviation, are not pixels: decode them, or undo the normalisation, first"
        )
    if dark and dark < count and high <= 255:
        return (
            f"{name}: {dark:,} of {count:,} images hold only floats between {-_DARK_IMAGE:g} and "
            f"{_DARK_IMAGE:g}, the first being image {found['first_dark']} (counted from 0), and "
            f"others up to {high:.3g}: some look scaled for a network. Bring all to [0, 255]; if "
            f"they are this dark, {_SAY.format('0..255')}"
        )
    return None


def are_cut_floats(values: set[int]) -> bool:
    """Whether these values are all among those of scaled floats that were cut to integers."""
    return values <= _CUT


def cut_floats_problem(name: str, values: set[int]) -> str | None:
    """Why integers cannot be pixels from 0 to 255; None if they can.

    Args:
        name: The source, for the message.
        values: All values of its images.
    """
    if not are_cut_floats(values) or not values - {0, 255}:
        return None
    return (
        f"{name}: holds only the values {', '.join(map(str, sorted(values)))}; expected pixels from 0 "
        "to 255. Floats in [0, 1] or [-1, 1] that were converted to integers look like this: scale "
        f"them first. If the images are meant to be so, {_SAY.format('0..255')}"
    )
